# SPDX-License-Identifier: Apache-2.0
"""A repository carries the code of its own family, and that is enough."""

import ast
import subprocess
import sys

import pytest
from families import FAMILIES
from test_safety import offences

import cmoe_hf
from cmoe_hf.conversion.folder.selection import code_of, select

MODULE = '''\
"""What it is."""

import os.path as path
from math import cos, sin as sine, tau  # of all things

# About the limit.
LIMIT = 3
"""It has a meaning."""
UNUSED = 4
"""So had this."""


def helper(x):
    return cos(x) + LIMIT


@staticmethod
# Why it is so.
def other(x: "Named") -> float:
    return sine(x)


class Named:
    y = tau


print(path)
'''


def test_what_is_needed_stays_word_for_word():
    found = select(MODULE, ("helper",))
    assert "from math import cos\n" in found and "sine" not in found
    assert '# About the limit.\nLIMIT = 3\n"""It has a meaning."""\n' in found
    assert "UNUSED" not in found and "So had this" not in found and "Named" not in found
    assert found.endswith("print(path)\n")
    assert '"""What it is."""\n\nimport os.path as path\n' in found


def test_a_name_in_quotes_is_a_name():
    found = select(MODULE, ("other",))
    assert "class Named" in found and "import sin as sine, tau\n" in found
    assert "@staticmethod\n# Why it is so.\ndef other" in found


def test_everything_wanted_is_everything():
    wanted = ("helper", "other", "Named", "UNUSED")
    assert select(MODULE, wanted) == MODULE


OTHERS = {"llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "olmoe", "gpt_neox"}


@pytest.mark.parametrize("config", [config for config, _, _ in cmoe_hf.FAMILIES])
def test_no_family_imports_another(config):
    own = config.model_type.removeprefix("cmoe_")
    for name, text in code_of(config).items():
        modules = {
            node.module.split(".")[2]
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.ImportFrom)
            and str(node.module).startswith("transformers.models.")
        }
        assert modules == {own}, name
        assert offences(text) == []


@pytest.mark.thorough
def test_the_code_works_where_other_families_are_gone(make_dense, carve):
    folder = carve(make_dense("mistral"), (2, 2, 8))
    gone = sorted(OTHERS - {"mistral"})
    program = f"""
import sys
sys.modules["cmoe_hf"] = None
for name in {gone}:
    for kind in ("configuration", "modeling"):
        sys.modules[f"transformers.models.{{name}}.{{kind}}_{{name}}"] = None
from transformers.dynamic_module_utils import get_class_from_dynamic_module as get
for entry in ("configuration_cmoe.CMoEMistralConfig", "modeling_cmoe.CMoEMistralForCausalLM"):
    print(get(entry, {str(folder)!r}).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["CMoEMistralConfig", "CMoEMistralForCausalLM"]
    assert {kind.model_type for kind, _ in FAMILIES.values()} == OTHERS
