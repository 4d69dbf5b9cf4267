# SPDX-License-Identifier: Apache-2.0
"""What the Python files that travel with every repository may and may not do."""

import ast
import re
from pathlib import Path

import pytest

import cmoe_hf
from cmoe_hf.conversion.folder.card import stated_hashes
from cmoe_hf.conversion.folder.selection import REMOTE_CODE
from cmoe_hf.conversion.folder.unfinished import sha256_of

HERE = Path(cmoe_hf.__file__).parent
LIBRARIES = re.compile(r"(torch|transformers|typing|huggingface_hub\.dataclasses)(\.|$)")
DANGEROUS = re.compile(r"hub\b|hub_|cpp_extension|dynamic_module|multiprocessing|_dynamo|package")
"""Parts of these libraries that fetch, build or start something."""
CALLS = {
    *("eval", "exec", "compile", "open", "input", "breakpoint", "globals", "__import__"),
    *("system", "popen", "fork", "urlopen", "urlretrieve", "connect", "import_module"),
    *("hf_hub_download", "snapshot_download", "cached_file", "from_pretrained", "load_library"),
    *("load", "loads", "load_state_dict", "load_inline", "save", "unlink", "remove", "rmtree"),
    *("write_text", "write_bytes", "read_text", "read_bytes", "touch", "mkdir"),
}
"""Functions and methods that read, write, fetch, start or interpret something."""
PARTLY = {"os": "PathLike", "inspect": "signature"}
"""Modules of which one thing may be used."""
INNARDS = {"__builtins__", "__subclasses__", "__globals__", "__code__", "__loader__"}


def offences(source):
    """What a file does that remote code must not do, from its syntax tree alone."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [it.name for it in names if it.name not in PARTLY or it.asname]
                found = [name for name in found if not is_harmless(name)]
            case ast.ImportFrom(module=module, names=names, level=0):
                imported = [f"{module}.{it.name}" for it in names]
                found += [name for name in imported if not is_harmless(name)]
            case ast.Attribute(value=ast.Name(id=module), attr=name) if module in PARTLY:
                found += [f"{module}.{name}"] if name != PARTLY[module] else []
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in CALLS:
                found.append(f"{name}()")
            case ast.Attribute(attr=name) | ast.Name(id=name) if name in INNARDS:
                found.append(name)
    return found


def is_harmless(module):
    """Whether a module, or a name in it, may be imported."""
    return bool(LIBRARIES.match(module)) and not DANGEROUS.search(
        module.removeprefix("huggingface_hub")
    )


@pytest.mark.parametrize("name", REMOTE_CODE)
def test_the_remote_code_touches_nothing_but_tensors(name):
    assert offences((HERE / name).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import subprocess",
        "import os; os.system('true')",
        "import os as o",
        "from os import system",
        "import inspect; inspect.currentframe()",
        "import requests",
        "from urllib.request import urlopen",
        "from pathlib import Path",
        "import pickle",
        "import cmoe_hf",
        "eval('1')",
        "exec('x = 1')",
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
    ],
)
def test_the_check_would_find_it(line):
    assert offences(line)


def test_the_card_states_the_hashes_of_the_code(carved):
    hashes = stated_hashes((carved / "README.md").read_text(encoding="utf-8"))
    assert hashes == {name: sha256_of(carved / name) for name in REMOTE_CODE}
