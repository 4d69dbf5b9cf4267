# SPDX-License-Identifier: Apache-2.0
"""The floor plan: imports between the wings of the toolchain run one way."""

import ast
from pathlib import Path

import cmoe_hf.conversion

HOUSE = Path(cmoe_hf.conversion.__file__).parent
FLOORS = {
    "": 0,  # errors, device and options
    "source": 1,
    "carve": 2,
    "folder": 3,
    "measure": 4,
    "verbs": 5,  # convert, plan, demo
    "show": 6,
    "tune": 6,
    "share": 6,
    "cli": 7,
}
GROUND = {"errors", "device", "options"}


def wing_of(parts):
    """The wing of a room, from its path in the package."""
    if len(parts) > 1 or (HOUSE / parts[0]).is_dir():
        return parts[0]
    return "" if parts[0] in GROUND else "verbs"


def arrows():
    """Wing and file of an import, and the wing of what is imported."""
    for path in HOUSE.rglob("*.py"):
        parts = path.relative_to(HOUSE).with_suffix("").parts
        if parts == ("__init__",):  # hands out every verb
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                package = parts[: len(parts) - node.level]
                rooms = [node.module] if node.module else [alias.name for alias in node.names]
                for room in rooms:
                    yield wing_of(parts), path, wing_of((*package, *room.split(".")))


def test_imports_run_from_the_cellar_to_the_roof():
    upwards = [
        f"{path.relative_to(HOUSE)} imports from {there}"
        for here, path, there in arrows()
        if there != here and FLOORS[there] >= FLOORS[here]
    ]
    assert not upwards


def test_every_wing_says_what_it_is_for():
    for wing in FLOORS.keys() - {"", "verbs"}:
        assert ast.get_docstring(ast.parse((HOUSE / wing / "__init__.py").read_text())), wing
    assert {path.name for path in HOUSE.iterdir() if (path / "__init__.py").is_file()} == {
        *(FLOORS.keys() - {"", "verbs"})
    }


def test_every_file_says_under_which_licence_it_is():
    root = Path(__file__).parent.parent
    folders = [root / name for name in ("src", "conversion", "tests", "examples")]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    silent = [
        path.relative_to(root).as_posix()
        for path in files
        if "fixtures" not in path.parts
        and not path.read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: Apache-2.0")
    ]
    assert files and not silent
