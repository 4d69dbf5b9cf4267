# SPDX-License-Identifier: Apache-2.0
"""What the Python files that travel with every repository may and may not do."""

import ast
import re
from pathlib import Path

import pytest

import cmoe_hf
from cmoe_hf.conversion.folder.card import stated_hashes
from cmoe_hf.conversion.folder.remote_code import REMOTE_CODE
from cmoe_hf.conversion.folder.unfinished import sha256_of

HERE = Path(cmoe_hf.__file__).parent
LIBRARIES = re.compile(
    r"(torch|transformers|typing|collections\.abc|huggingface_hub\.dataclasses)(\.|$)"
    r"|triton(\.language)?$"
)
DANGEROUS = re.compile(r"hub\b|hub_|cpp_extension|dynamic_module|multiprocessing|_dynamo|package")
"""Parts of these libraries that fetch, build or start something."""
CALLS = {
    *("eval", "exec", "compile", "open", "input", "breakpoint", "globals", "__import__"),
    *("system", "popen", "fork", "urlopen", "urlretrieve", "connect", "import_module"),
    *("hf_hub_download", "snapshot_download", "cached_file", "from_pretrained", "load_library"),
    *("load", "loads", "load_state_dict", "load_inline", "save", "unlink", "rmtree"),
    *("write_text", "write_bytes", "read_text", "read_bytes", "touch", "mkdir"),
}
"""Functions and methods that read, write, fetch, start or interpret something."""
PARTLY = {
    "functools": ("cache", "partial", "wraps"),
    "inspect": ("signature",),
    "math": ("gcd",),
    "os": ("PathLike",),
    "statistics": ("median",),
    "threading": ("RLock",),
    "time": ("perf_counter",),
}
"""Modules of which some things may be used."""
VARIABLE = "os.environ.get('CMOE_TUNE')"
"""What may be read of the environment."""
KERNELS = "import triton.language as tl"
"""The module in which `load` reads the memory of a GPU."""
HARMLESS_DUNDERS = {"__name__", "__qualname__", "__module__", "__version__", "__annotations__"}
INDIRECT = {
    *("getattr", "hasattr", "setattr", "delattr", "vars", "dir", "locals", "globals", "eval"),
    *("exec", "compile", "open", "input", "breakpoint", "attrgetter", "methodcaller"),
}
"""Names that must not be passed around: only calls of the first two are looked into."""
GLOBAL_STATE = re.compile(
    r"backends$|ops$|classes$|environ|(set|enable|disable|allow|use_deterministic)_|(manual_)?seed"
)
"""Attributes of libraries that are, or change, state of the whole process."""
CHANGES = {"update", "setdefault", "pop", "popitem", "clear", "append", "extend", "insert"}


def offences(source):
    """What a file does that remote code must not do, from its syntax tree alone."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    libraries = {it.asname or it.name.split(".")[0] for node in imports for it in node.names}
    overridden = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    inspected = [node for node in nodes if is_plain_getattr(node, libraries)]
    allowed = {id(node.func) for node in inspected}
    allowed |= {id(node) for node in nodes if is_definition(node, overridden)}
    read = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node) == VARIABLE]
    allowed |= {id(it) for call in read for it in ast.walk(call)}
    bound = [ast.unparse(it) for it in imports if "tl" in ast.unparse(it).split()]
    bound += [it.arg for it in nodes if isinstance(it, ast.arg) and it.arg == "tl"]
    bound += [it.id for it in nodes if is_stored(it) and it.id == "tl"]
    if bound == [KERNELS]:
        allowed |= {id(node) for node in nodes if is_load_of_a_kernel(node)}
    found = []
    for node in nodes:
        match node:
            case ast.Import(names=names):
                own = [it.name for it in names if it.name not in PARTLY or it.asname]
                found += [name for name in own if not is_harmless(name)]
            case ast.ImportFrom(module=module, names=names, level=0):
                imported = [f"{module}.{it.name}" for it in names]
                found += [name for name in imported if not is_harmless(name)]
            case ast.ImportFrom(module=module) if f"{module}.py" not in REMOTE_CODE:
                found.append(f".{module}")
            case ast.Attribute(value=ast.Name(id=module), attr=name) if module in PARTLY:
                is_allowed = name in PARTLY[module] or id(node) in allowed
                found += [] if is_allowed else [f"{module}.{name}"]
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in CALLS:
                found += [] if id(node) in allowed else [f"{name}()"]
            case ast.Call(func=ast.Attribute(value=owner, attr=name)) if (
                name in CHANGES and root(owner) in libraries
            ):
                found.append(f"{root(owner)}: {name}()")
            case ast.MatchClass(kwd_attrs=names):
                found += [name for name in names if is_inner(name)]
        match node:
            case ast.Attribute(attr=name) if is_inner(name) and id(node) not in allowed:
                found.append(name)
            case ast.Name(id=name) if name in INDIRECT | {"__builtins__", "__loader__"}:
                found += [] if id(node) in allowed else [name]
            case ast.Attribute(ctx=context) | ast.Subscript(ctx=context):
                is_read = isinstance(context, ast.Load)
                found += [] if is_read or root(node) not in libraries else [ast.unparse(node)]
    return found


def is_inner(name):
    """Whether an attribute is private, or state of the whole process."""
    is_private = name.startswith("_") and name not in HARMLESS_DUNDERS
    return is_private or bool(GLOBAL_STATE.match(name))


def is_plain_getattr(node, libraries):
    """Whether a node reads a public attribute by a written name, and of no module."""
    match node:
        case ast.Call(
            func=ast.Name(id="getattr" | "hasattr"), args=[owner, ast.Constant(value=str(name)), *_]
        ):
            return root(owner) not in libraries and not is_inner(name)
    return False


def is_definition(node, overridden):
    """Whether a node calls what it overrides, or sets an attribute of its own class."""
    match node:
        case ast.Attribute(value=ast.Call(func=ast.Name(id="super"), args=[]), attr=name):
            return name in overridden
        case ast.Attribute(value=ast.Name(id="cls"), ctx=ast.Store(), attr=name):
            return not name.startswith("__")
    return False


def is_stored(node):
    """Whether a node gives a name another value."""
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def is_load_of_a_kernel(node):
    """Whether a node reads the memory of a GPU, inside a kernel."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load"


def root(node):
    """The name that a chain of attributes, calls and subscripts begins with."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def is_harmless(module):
    """Whether a module, or a name in it, may be imported."""
    parts = module.split(".")
    if not LIBRARIES.match(module) or "*" in parts or any(is_inner(part) for part in parts):
        return False
    return not DANGEROUS.search(module.removeprefix("huggingface_hub"))


@pytest.mark.parametrize("name", REMOTE_CODE)
def test_the_remote_code_touches_nothing_but_tensors(name):
    assert offences((HERE / name).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import subprocess",
        "import os; os.system('true')",
        "from os import system",
        "import requests",
        "import pickle",
        "import cmoe_hf",
        "eval('1')",
        "open('/etc/passwd')",
        "__import__('socket')",
        "torch.load('weights.pt')",
        "torch.utils.cpp_extension.load_inline('x', '')",
        "().__class__.__base__.__subclasses__()",
        "print(__builtins__)",
        "from huggingface_hub import hf_hub_download",
        "from transformers.utils.hub import cached_file as f",
        "import torch.hub",
        "x.to_disk.save('here')",
        "from .elsewhere import x",
        "from torch import *",
        # State of the process, or of a library's inside, however it is reached.
        "import torch; torch.backends.mkldnn.enabled = False",
        "from torch import backends as b",
        "import torch.backends.mkldnn",
        "from torch import set_default_dtype",
        "import torch; torch.manual_seed(0)",
        "import torch; torch.float = torch.float64",
        "import torch; del torch.nn.Linear",
        "import os; os.environ['OMP_NUM_THREADS'] = '1'",
        "import os; os.environ.get('HF_TOKEN')",
        "import os; os.environ",
        "import torch as tl; tl.load('weights.pt')",
        "import torch; import triton.language as tl; tl = torch; tl.load('weights.pt')",
        "import triton.language as tl; f = lambda tl: tl.load('weights.pt')",
        "import triton.runtime.build",
        "from triton import runtime",
        "from transformers.activations import ACT2FN; ACT2FN['silu'] = print",
        "import torch; switch = torch._C._set_mkldnn_enabled",
        "import torch; product = getattr(torch.ops.mkldnn, '_linear_pointwise', None)",
        "import torch; any(getattr(torch.cpu, name, bool)() for name in NAMES)",
        "from torch import cpu; getattr(cpu, 'anything')",
        "from torch import _C",
        "getattr(model, '_modules')",
        "getattr(model, name)",
        "getattr(model, 'set_things')()",
        "setattr(model, 'name', 1)",
        "vars(module)['_forward_hooks']",
        "module.__dict__['forward']",
        "object.__setattr__(module, 'forward', print)",
        "read = getattr",
        "import operator; operator.attrgetter('_C')",
        "self.experts.config._experts_implementation",
        "super()._secret()",
        "self._no_split_modules = []",
        "match torch:\n    case object(_C=inside): pass",
    ],
)
def test_the_check_would_find_it(line):
    assert offences(line)


@pytest.mark.parametrize(
    "line",
    [
        "import os; os.environ.get('CMOE_TUNE')",
        "import triton.language as tl; tl.load(pointer)",
        "getattr(config, 'sliding_window', None)",
        "hasattr(config, 'rope_scaling')",
        "class Model:\n    _no_split_modules = ['Layer']",
        "class Model:\n    def _init_weights(self, it):\n        super()._init_weights(it)",
        "class Model:\n    def __init_subclass__(cls):\n        cls._no_split_modules = []",
        "import torch; torch.is_grad_enabled(), torch.__version__, type(x).__name__",
        "import torch; x.weight[0] = torch.zeros(3)",
        "from transformers.integrations.moe import F; F.register('cmoe', print)",
    ],
)
def test_the_check_lets_it_pass(line):
    assert not offences(line)


def test_the_card_states_the_hashes_of_the_code(carved):
    hashes = stated_hashes((carved / "README.md").read_text(encoding="utf-8"))
    assert hashes == {name: sha256_of(carved / name) for name in REMOTE_CODE}
