# SPDX-License-Identifier: Apache-2.0
"""What the site has beside the pages of docs/: hooks of mkdocs.

The README is its first page. Files elsewhere in the repository that a page links to are carried
along, so that links work both here and where the repository is shown. Two pages are made from
the source: every error message, and the API.
"""

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from posixpath import normpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
ERRORS = ("RequestError", "CMoEError", "missing")
ROOMS = {
    "convert.py": "Convert",
    "plan.py": "Plan",
    "device.py": "Devices",
    "source": "What comes in",
    "carve": "The shape and the recipe",
    "folder": "Folders",
    "measure": "Measuring",
    "show": "Report and sweep",
    "tune": "Recovery",
    "share": "Export, publish, serve, verify, upgrade",
    "cli": "The command line",
}
"""Files and folders of conversion/, in the order of the page."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and what they and the others link to."""
    pages = {
        "index.md": (ROOT / "README.md").read_text(encoding="utf-8"),
        "messages.md": messages(),
        "api.md": api(),
        **{
            name: (ROOT / name).read_text(encoding="utf-8")
            for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
        },
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    for page in list(files.documentation_pages()):
        for link in LINK.findall(page.content_string):
            place = moved(link, page.src_uri)
            target = ROOT / place
            if files.get_file_from_path(place) is None and target.is_file():
                files.append(File.generated(config, place, abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are on the site, where docs/ is the top; folders have no page there."""

    def link(found: re.Match[str]) -> str:
        place = moved(found[1], page.file.src_uri)
        depth = page.file.src_uri.count("/")
        return "../" * depth + place

    folders = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)\)")
    markdown = folders.sub(
        lambda found: (
            found[1] if (ROOT / moved(found[2], page.file.src_uri)).is_dir() else found[0]
        ),
        markdown,
    )
    return LINK.sub(link, markdown)


def moved(link: str, page: str) -> str:
    """Where a relative link of a page leads, from the top of the site."""
    is_root = page in ("index.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
    folder = PurePosixPath("." if is_root else "docs") / PurePosixPath(page).parent
    place = normpath(str(folder / link))
    if place == "README.md":
        return "index.md"
    return place.removeprefix("docs/")


def messages() -> str:
    """A page of every error that the toolchain can raise, as it stands in the source."""
    house, blocks = ROOT / "conversion", ["# All messages"]
    blocks.append(
        "Each says what was found and what to do; … stands for what it found. Those of one line "
        "here are one line there, behind `error:`."
    )
    for room, title in ROOMS.items():
        at = house / room
        paths = [at] if at.is_file() else sorted(at.rglob("*.py"))
        lines = [f"* {said}" for path in paths for said in raised(path)]
        blocks += [f"## {title}", "\n".join(dict.fromkeys(lines))] if lines else []
    return "\n\n".join(blocks) + "\n"


def raised(path: Path) -> Iterator[str]:
    """The messages of our errors in one file, with … for what is filled in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS and node.args:
            said = spoken(node.args[0])
            if any(letter.isalpha() for letter in said):
                yield re.sub(r"([<>*_\[\]])", r"\\\1", said)


def spoken(node: ast.expr) -> str:
    """A string of the source, with … for its variables."""
    match node:
        case ast.Constant():
            return str(node.value)
        case ast.JoinedStr():
            return "".join(map(spoken, node.values))
        case ast.BinOp():
            return spoken(node.left) + spoken(node.right)
    return "…"


def source_of(module: str) -> str:
    """Return the text of a module of the toolchain."""
    path = ROOT.joinpath("conversion", *module.split("."))
    return path.with_suffix(".py").read_text(encoding="utf-8")


def api() -> str:
    """The public names, each with a directive for mkdocstrings."""
    tree = ast.parse((ROOT / "conversion" / "__init__.py").read_text(encoding="utf-8"))
    homes = {
        alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    verbs = sorted(name for name in homes if name.islower())
    classes = sorted(name for name in homes if name[0].isupper() and not name.isupper())
    blocks = [
        "# Python API",
        "`from cmoe_hf.conversion import convert, evaluate`: each command is a verb with the same "
        "options, keyword only; it returns a frozen dataclass, and neither prints nor exits.",
    ]
    options = sorted(
        f"{module}.{name}"
        for module in set(homes.values())
        for name in re.findall(r"^class (\w+Options)\b", source_of(module), re.MULTILINE)
    )
    for title, names in {
        "Verbs": [f"{homes[name]}.{name}" for name in verbs],
        "Options of the verbs, as keywords": options,
        "Settings, results and errors": [f"{homes[name]}.{name}" for name in classes],
    }.items():
        blocks.append(f"## {title}")
        blocks += [f"::: cmoe_hf.conversion.{name}" for name in names]
    return "\n\n".join(blocks) + "\n"


def on_startup(command: str, dirty: bool) -> None:
    """Both halves of the package as one tree, for mkdocstrings, which does not import. It forgets
    paths that are not there when it is configured."""
    package = ROOT / "build" / "api" / "cmoe_hf"
    shutil.rmtree(package, ignore_errors=True)
    only_code = shutil.ignore_patterns("__pycache__", "assets")
    shutil.copytree(ROOT / "src" / "cmoe_hf", package, ignore=only_code)
    shutil.copytree(ROOT / "conversion", package / "conversion", ignore=only_code)
