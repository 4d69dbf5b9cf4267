# SPDX-License-Identifier: Apache-2.0
"""Write the tables of the pages from the JSON files beside this script: `make results`.

A page says where a table stands, `<!-- results: NAME -->` ... `<!-- end -->`: the section of
NAME.json. `<!-- rows: NAME -->` is its table alone. CONTRIBUTING.md describes the files.
"""

import argparse
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from picture import svg

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PLACE = re.compile(r"<!-- (results|rows): ([a-z0-9-]+) -->\n.*?<!-- end -->", re.DOTALL)
NEEDED = {"title", "machine", "versions", "date", "columns", "rows"}
OPTIONAL = {"command", "commit", "about", "readings", "level", "picture", "rerun"}
OF_A_PART = {"part_of", "about", "columns", "rows", "readings", "picture", "rerun"}
WIDTH = 110


def names() -> list[str]:
    """Return the names of all tables."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.json"))


def read(name: str) -> dict[str, Any]:
    """Read a table. Raise `ValueError` if its keys or rows are not as CONTRIBUTING.md describes."""
    table: dict[str, Any] = json.loads((Path(__file__).parent / f"{name}.json").read_text("utf-8"))
    part = "part_of" in table
    unknown = table.keys() - (OF_A_PART if part else NEEDED | OPTIONAL)
    missing = ({"columns", "rows"} if part else NEEDED) - table.keys()
    if unknown or missing:
        raise ValueError(f"{name}.json: unknown keys {sorted(unknown)}, missing {sorted(missing)}")
    if part and table["part_of"] not in names():
        raise ValueError(f"{name}.json: there is no table {table['part_of']} to be part of")
    for row in table["rows"]:
        if len(row) != len(table["columns"]):
            raise ValueError(f"{name}.json: not {len(table['columns'])} cells in the row {row}")
    return table


def grid(table: dict[str, Any]) -> str:
    """Format the rows of a table in Markdown."""
    lines = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def paragraphs(content: str | list[str]) -> list[str]:
    """Fill paragraphs; those with line breaks stay as they are."""
    several = [content] if isinstance(content, str) else content
    return [text if "\n" in text else filled(text) for text in several]


def filled(text: str, indent: str = "") -> str:
    """Fill lines of at most 110 characters, the later ones indented."""
    return textwrap.fill(
        text,
        WIDTH,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def provenance(table: dict[str, Any]) -> str:
    """Format where and when a table was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in table["versions"].items())
    when = " at ".join(filter(None, [table["date"], table.get("commit")]))
    return filled(f"*{table['machine']}; {versions}; {when}.*")


def section(name: str) -> str:
    """Format a section: title, command, provenance, text, table and readings."""
    table, blocks = read(name), []
    if "part_of" not in table:
        blocks.append(f"{'#' * table.get('level', 2)} {table['title']}")
        if "command" in table:
            blocks.append("\n".join(["```bash", *table["command"], "```"]))
        blocks.append(provenance(table))
    blocks += paragraphs(table.get("about", []))
    blocks.append(grid(table))
    if "readings" in table:
        blocks.append("\n".join(filled(f"* {text}", "  ") for text in table["readings"]))
    return "\n\n".join(blocks)


def written(page: str) -> str:
    """Return a page with its tables replaced by those of the JSON files."""

    def place(found: re.Match[str]) -> str:
        kind, name = found.groups()
        content = section(name) if kind == "results" else grid(read(name))
        return f"<!-- {kind}: {name} -->\n\n{content}\n\n<!-- end -->"

    return PLACE.sub(place, page)


def main() -> None:
    """Write every page, or with `--check` name those that are not up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check, shown, stale = parser.parse_args().check, set[str](), []
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        shown |= {name for _, name in PLACE.findall(page)}
        if written(page) != page:
            stale.append(path.relative_to(ROOT).as_posix())
            if not check:
                path.write_text(written(page), encoding="utf-8")
    for table in map(read, names()):
        if (asked := table.get("picture")) is not None:
            path = ROOT / "docs" / asked.pop("file")
            drawing = svg(
                table["columns"], [table["rows"][row] for row in asked.pop("rows")], **asked
            )
            if not path.is_file() or path.read_text(encoding="utf-8") != drawing:
                stale.append(path.name)
                if not check:
                    path.write_text(drawing, encoding="utf-8")
    if missing := sorted(set(names()) - shown):
        sys.exit(f"no page shows {', '.join(missing)}: add `<!-- results: NAME --><!-- end -->`.")
    if check and stale:
        sys.exit(f"run `make results`: {', '.join(stale)} differ from results/*.json.")
    print(f"{len(names())} tables, {', '.join(stale) or 'no page'} changed")


if __name__ == "__main__":
    main()
