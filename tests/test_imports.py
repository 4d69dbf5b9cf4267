# SPDX-License-Identifier: Apache-2.0
"""Imports between the packages of the toolchain run one way, and every file names its licence."""

import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import cmoe_hf.conversion

ROOT = Path(__file__).parents[1]
TOOLCHAIN = Path(cmoe_hf.conversion.__file__).parent


def imported_packages():
    """The packages and top-level modules of the toolchain, and which others each imports."""
    graph = defaultdict(set)
    for path in TOOLCHAIN.rglob("*.py"):
        parts = path.relative_to(TOOLCHAIN).with_suffix("").parts
        if parts == ("__init__",):  # exports the public names
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                package = parts[: len(parts) - node.level]
                modules = [node.module] if node.module else [alias.name for alias in node.names]
                for module in modules:
                    there = (*package, *module.split("."))[0]
                    graph[parts[0]] |= {there} - {parts[0]}
    return graph


def test_packages_do_not_import_each_other_in_a_circle():
    graph = imported_packages()
    assert {"cli", "carve", "source"} <= graph.keys()
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("source") < order.index("carve") < order.index("cli")


def test_the_model_does_not_import_the_toolchain():
    for path in (ROOT / "src" / "cmoe_hf").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "cmoe_hf.conversion" not in ast.unparse(node), path.name


def test_every_file_says_under_which_licence_it_is():
    folders = [ROOT / name for name in ("src", "conversion", "tests", "examples", "results")]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    silent = [
        path.relative_to(ROOT).as_posix()
        for path in files
        if "fixtures" not in path.parts
        and not path.read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: Apache-2.0")
    ]
    assert files and not silent
