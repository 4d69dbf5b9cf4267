# SPDX-License-Identifier: Apache-2.0
"""Selects from a Python module what some of its classes need.

A carved repository carries the code of its own family: shorter to read for whoever is asked to
trust it, and indifferent to what a later transformers does to the modules of other families.
"""

import ast
import hashlib
import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cmoe_hf
from cmoe_hf import CMoEConfig

REMOTE_CODE = ("configuration_cmoe.py", "modeling_cmoe.py")


@dataclass
class Piece:
    """A top-level statement with what stands above it."""

    node: ast.stmt
    above: str
    """Empty lines and comments."""
    text: str
    """With the string that documents it, if that follows."""
    defines: set[str]
    uses: set[str]


def code_of(family: type[CMoEConfig]) -> dict[str, str]:
    """The Python files, by name, that models of a family need beside their weights."""
    classes = tuple(entry.rpartition(".")[2] for entry in family.local_auto_map().values())
    here = Path(cmoe_hf.__file__).parent
    return {name: select((here / name).read_text("utf-8"), classes) for name in REMOTE_CODE}


def code_of_type(model_type: str | None) -> dict[str, str]:
    """The same by `model_type`; empty for a model that is not carved."""
    return next((code_of(it) for it, *_ in cmoe_hf.FAMILIES if it.model_type == model_type), {})


@cache
def select(module: str, wanted: tuple[str, ...]) -> str:
    """Return the source of a module without the definitions that `wanted` do not need.

    What stays does so word for word, with the comments above it; imports name only what is left. A
    definition is needed if its name occurs in another one that is, also as a string, as in an
    annotation.
    """
    pieces = split(module)
    needed = set(wanted).union(*(piece.uses for piece in pieces if not piece.defines))
    before: set[str] = set()
    while needed != before:
        before = set(needed)
        needed = before.union(*(piece.uses for piece in pieces if piece.defines & before))
    return "".join(remains(piece, needed) for piece in pieces)


def split(module: str) -> list[Piece]:
    """The top-level statements of a module, which together are all of its text."""
    lines = module.splitlines(keepends=True)
    pieces: list[Piece] = []
    done = 0
    for node in ast.parse(module).body:
        decorators = getattr(node, "decorator_list", [])
        start = min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1
        above, text = "".join(lines[done:start]), "".join(lines[start : node.end_lineno])
        done = node.end_lineno or start
        is_string = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_string and pieces:
            pieces[-1].text += above + text
        else:
            pieces.append(Piece(node, above, text, defined(node), used(node)))
    return pieces


def defined(node: ast.stmt) -> set[str]:
    """Names that a top-level statement binds."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    stored = (part for part in ast.walk(node) if isinstance(part, ast.Name))
    return {name.id for name in stored if isinstance(name.ctx, ast.Store)}


def used(node: ast.stmt) -> set[str]:
    """Names that occur in a top-level statement."""
    found = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    constants = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))
    return found | {value for value in constants if isinstance(value, str)}


def remains(piece: Piece, needed: set[str]) -> str:
    """The text of a statement, or what is left of it."""
    node = piece.node
    if piece.defines and not piece.defines & needed:
        return ""
    if isinstance(node, ast.Import | ast.ImportFrom) and not piece.defines <= needed:
        node.names = [alias for alias in node.names if (alias.asname or alias.name) in needed]
        return f"{piece.above}{ast.unparse(node)}\n"
    return piece.above + piece.text


if __name__ == "__main__":  # a release adds what it puts into repositories
    known = Path(sys.argv[1])
    hashes = json.loads(known.read_text(encoding="utf-8"))
    for config, *_ in cmoe_hf.FAMILIES:
        for name, text in code_of(config).items():
            hashes[hashlib.sha256(text.encode()).hexdigest()] = name
    known.write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
