# SPDX-License-Identifier: Apache-2.0
"""CONTRIBUTING's "Add a model family", done to a copy of the repository as it is written."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import families
import pytest
import torch
from transformers import AutoModelForCausalLM

from cmoe_hf.conversion.demo import CALIBRATION
from cmoe_hf.conversion.source.architectures import ARCHITECTURES

ROOT = Path(__file__).parent.parent
SECTION = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Add a model family\n")[1]
SECTION = SECTION.split("\n## ")[0]

TOY = "Helium"
"""Its attention rotates other pairs than Llama's, so that Llama's classes would not do."""
GENERATE = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}

CONVERT = """
import sys
from pathlib import Path
import cmoe_hf
from cmoe_hf.conversion import convert
source, dense, carved, text, *_ = sys.argv[1:]
assert Path(cmoe_hf.__file__).is_relative_to(source), cmoe_hf.__file__
convert(
    dense, carved, shared=2, active=6, experts=8,
    calibration=text, samples=4, sequence_length=64,
)
"""
WITHOUT_PACKAGE = """
import sys
sys.modules["cmoe_hf"] = None  # any import of it fails
"""
USE = """
import json
import torch
from transformers import AutoModelForCausalLM
folder, settings, found = sys.argv[-3:]
options = {} if sys.modules["cmoe_hf"] else {"trust_remote_code": True}
model, info = AutoModelForCausalLM.from_pretrained(
    folder, dtype="float32", output_loading_info=True, **options
)
assert not any(info.values()), info
ids = torch.arange(2, 66).view(2, 32)
with torch.no_grad():
    logits = model.eval()(ids).logits
tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **json.loads(settings))
torch.save((type(model).__module__, logits, tokens), found)
"""


def steps(name: str) -> dict[str, str]:
    """What the section says to write, by file, with `Name` as given."""
    found = {}
    for step in re.split(r"^\d\. ", SECTION, flags=re.MULTILINE)[1:]:
        if code := re.search(r"^ *```python\n(.*?)^ *```", step, re.MULTILINE | re.DOTALL):
            [path] = re.findall(r"`([\w/]+\.py)`", step.partition("```")[0])
            code = dedent(code[1]).replace("...,", "")
            found[path] = code.replace("Name", name).replace("name", name.lower())
    return found


def parts(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Imports, classes and the entries of tables, each with the kind or the table's name."""
    for node in tree.body:
        match node:
            case ast.ImportFrom(module=module, names=names, level=level):
                for it in names:
                    yield "import", f"from {'.' * level}{module} import {ast.unparse(it)}"
            case ast.ClassDef():
                yield "class", ast.unparse(node)
            case ast.Assign(targets=[target]) | ast.AnnAssign(target=target):
                match node.value:
                    case ast.Dict(keys=keys, values=values):
                        pairs = zip(keys, values, strict=True)
                        entries = [f"{ast.unparse(k)}: {ast.unparse(v)}" for k, v in pairs]
                    case ast.List(elts=values) | ast.Tuple(elts=values):
                        entries = map(ast.unparse, values)
                    case _:
                        continue
                for entry in entries:
                    yield ast.unparse(target), entry


def follow(code: str, source: str) -> str:
    """The file with what a step says to write."""
    after = {}  # the line that each kind of part goes after
    for node in ast.parse(source).body:
        match node:
            case ast.Import() | ast.ImportFrom():
                after["import"] = node.end_lineno
            case ast.Assign(targets=[target]) | ast.AnnAssign(target=target):
                after[ast.unparse(target)] = node.end_lineno - 1
            case ast.ClassDef():
                after["class"] = node.end_lineno
    added = defaultdict(list)
    for kind, text in parts(ast.parse(code)):
        added[after[kind]].append(text if kind in ("import", "class") else f"{text},")
    lines = []
    for number, line in enumerate(source.splitlines(), 1):
        lines += [line, *added[number]]
    return "\n".join(lines) + "\n"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of this one in which the steps are done."""
    assert TOY.lower() not in ARCHITECTURES, "it is supported now: choose another"
    copy = tmp_path / "repository"
    for folder in ("src", "conversion", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "src" / "cmoe_hf" / "conversion").symlink_to(copy / "conversion")  # see setup.cfg
    for path, code in steps(TOY).items():
        source = (copy / path).read_text(encoding="utf-8")
        (copy / path).write_text(follow(code, source), encoding="utf-8")
    return copy


@pytest.fixture
def dense(repository, make_dense, monkeypatch) -> Path:
    """A random model with the pico configuration of the copy."""
    path = repository / "tests" / "families.py"
    spec = importlib.util.spec_from_file_location("families_of_the_copy", path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    monkeypatch.setitem(families.FAMILIES, TOY.lower(), copy.FAMILIES[TOY.lower()])
    return make_dense(TOY.lower())


def test_the_steps_are_those_of_a_real_family():
    for path, code in steps("Mistral").items():
        wanted = set(parts(ast.parse(code)))
        if path.startswith("tests/"):  # every family has its own pico configuration
            wanted = {part for part in wanted if part[0] == "import"}
        assert wanted
        assert wanted <= set(parts(ast.parse((ROOT / path).read_bytes()))), path


@pytest.mark.thorough
def test_a_family_added_as_written_is_exact_and_generates(repository, dense, tmp_path):
    source, carved = repository / "src", tmp_path / "carved"
    found = {"cmoe_hf": tmp_path / "here.pt", "transformers_modules": tmp_path / "there.pt"}
    for script, path in zip((CONVERT + USE, WITHOUT_PACKAGE + USE), found.values(), strict=True):
        done = subprocess.run(
            [
                *(sys.executable, "-c", script, source, dense, carved, CALIBRATION),
                *(carved, json.dumps(GENERATE), path),
            ],
            env={
                **os.environ,
                "PYTHONPATH": str(source),
                "HF_MODULES_CACHE": str(tmp_path / "modules"),
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr

    config = json.loads((carved / "config.json").read_text())
    assert config["model_type"] == f"cmoe_{TOY.lower()}"
    assert (config["num_experts"], config["num_experts_per_tok"]) == (6, 6)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype="float32").eval()
    ids = torch.arange(2, 66).view(2, 32)
    with torch.no_grad():
        expected = model(ids).logits
    continued = model.generate(ids, attention_mask=torch.ones_like(ids), **GENERATE)
    for package, path in found.items():
        module, logits, tokens = torch.load(path)
        assert module.partition(".")[0] == package
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        assert torch.equal(tokens, continued)
