# SPDX-License-Identifier: Apache-2.0
"""Hooks of mkdocs that add pages to the site.

The README is its first page. Files elsewhere in the repository that a page links to are copied, so
that links work both on the site and in the repository. Two pages are generated from the source:
all error messages, and the API.
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
PARTS = {
    "convert.py": "Convert",
    "plan.py": "Plan",
    "device.py": "Devices",
    "source": "Checkpoints and texts",
    "carve": "Shape and recipe",
    "folder": "Folders",
    "measure": "Evaluate and benchmark",
    "show": "Report and sweep",
    "tune": "Recover",
    "share": "Export, publish, serve, verify, upgrade",
    "cli": "The command line",
}
"""Files and folders of conversion/ and their headings, in the order of the page."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and the files that pages link to."""
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
    """Rewrite links for the site, where docs/ is the top; links to folders become plain text."""

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
    """Return where a relative link of a page leads, from the top of the site."""
    is_root = page in ("index.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
    folder = PurePosixPath("." if is_root else "docs") / PurePosixPath(page).parent
    place = normpath(str(folder / link))
    if place == "README.md":
        return "index.md"
    return place.removeprefix("docs/")


def messages() -> str:
    """Return a page of all errors that the toolchain can raise."""
    blocks = ["# All messages", "Errors of the command line and of Python; … stands for a value."]
    for part, title in PARTS.items():
        place = ROOT / "conversion" / part
        paths = [place] if place.is_file() else sorted(place.rglob("*.py"))
        lines = [f"* {said}" for path in paths for said in raised(path)]
        blocks += [f"## {title}", "\n".join(dict.fromkeys(lines))] if lines else []
    return "\n\n".join(blocks) + "\n"


def raised(path: Path) -> Iterator[str]:
    """Yield the error messages in one file, with … for values."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS and node.args:
            said = message(node.args[0])
            if any(letter.isalpha() for letter in said):
                yield re.sub(r"([<>*_\[\]])", r"\\\1", said)


def message(node: ast.expr) -> str:
    """Return a string of the source, with … for values."""
    match node:
        case ast.Constant():
            return str(node.value)
        case ast.JoinedStr():
            return "".join(map(message, node.values))
        case ast.BinOp():
            return message(node.left) + message(node.right)
    return "…"


def source_of(module: str) -> str:
    """Return the text of a module of the toolchain."""
    path = ROOT.joinpath("conversion", *module.split("."))
    return path.with_suffix(".py").read_text(encoding="utf-8")


def api() -> str:
    """Return a page of the public names, with directives for mkdocstrings."""
    tree = ast.parse((ROOT / "conversion" / "__init__.py").read_text(encoding="utf-8"))
    modules = {
        alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    functions = sorted(name for name in modules if name.islower())
    classes = sorted(name for name in modules if name[0].isupper() and not name.isupper())
    blocks = [
        "# Python API",
        "`from cmoe_hf.conversion import convert, evaluate`: each command is a function with the "
        "same options, keyword only; it returns a frozen dataclass, and neither prints nor exits.",
    ]
    options = sorted(
        f"{module}.{name}"
        for module in set(modules.values())
        for name in re.findall(r"^class (\w+Options)\b", source_of(module), re.MULTILINE)
    )
    for title, names in {
        "Functions": [f"{modules[name]}.{name}" for name in functions],
        "Options, as keywords": options,
        "Settings, results and errors": [f"{modules[name]}.{name}" for name in classes],
    }.items():
        blocks.append(f"## {title}")
        blocks += [f"::: cmoe_hf.conversion.{name}" for name in names]
    return "\n\n".join(blocks) + "\n"


def on_startup(command: str, dirty: bool) -> None:
    """Copy both parts of the package into one tree for mkdocstrings, which does not import them.

    It must exist at startup: paths that are missing then are ignored.
    """
    package = ROOT / "build" / "api" / "cmoe_hf"
    shutil.rmtree(package, ignore_errors=True)
    only_code = shutil.ignore_patterns("__pycache__", "assets")
    shutil.copytree(ROOT / "src" / "cmoe_hf", package, ignore=only_code)
    shutil.copytree(ROOT / "conversion", package / "conversion", ignore=only_code)
