# SPDX-License-Identifier: Apache-2.0
"""The pages: their tables, links, lengths, and what they say of installing."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
SOURCES = [*(ROOT / "src").rglob("*.py"), *(ROOT / "conversion").rglob("*.py")]
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def anchors(page):
    """What GitHub and the site call the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text("utf-8")), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings]
    return {re.sub(r"\s", "-", heading.strip()) for heading in plain}


def test_the_tables_are_those_of_the_results():
    done = subprocess.run(
        [sys.executable, ROOT / "results" / "tables.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_table_that_differs_is_noticed(tmp_path):
    copy = tmp_path / "results"
    copy.mkdir()
    for path in (ROOT / "results").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    names = [path.stem for path in copy.glob("*.json")]
    places = "\n".join(f"<!-- results: {name} -->\n<!-- end -->" for name in names)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(places)

    def tables(*arguments):
        command = [sys.executable, copy / "tables.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    assert "run `make results`" in tables("--check").stderr
    assert tables().returncode == 0 and tables("--check").returncode == 0
    (copy / "speed-ffn.json").write_text(
        (copy / "speed-ffn.json").read_text("utf-8").replace("29.9 / 8.55", "29.9 / 1.55")
    )
    assert "README.md differ" in tables("--check").stderr
    (copy / "another.json").write_text('{"part_of": "vllm", "columns": ["a"], "rows": [[1]]}')
    assert "no page shows another" in tables("--check").stderr
    (copy / "another.json").write_text('{"part_of": "vllm", "columns": ["a"], "rows": [[1, 2]]}')
    (tmp_path / "README.md").write_text("<!-- rows: another -->\n<!-- end -->")
    assert "not 1 cells in the row" in tables().stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_no_page_is_too_long():
    long = {page.name: len(page.read_text("utf-8").splitlines()) for page in PAGES}
    assert long["README.md"] <= 150
    assert not {name: lines for name, lines in long.items() if lines > 250}


def test_there_is_one_way_to_install():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = extras["optional-dependencies"].keys()
    texts = [*PAGES, *SOURCES, *(ROOT / "examples").iterdir()]
    for path in texts:
        text = path.read_text(encoding="utf-8")
        if path.name != "troubleshooting.md":  # which says that this is not the way
            assert not re.search(r"pip install \W*cmoe-hf", text), path.name
        for extra in re.findall(r"pip install '?\.\[(\w+)\]", text):
            assert extra in extras, (path.name, extra)
    for path in SOURCES:  # those that errors name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "missing":
                assert ast.literal_eval(node.args[1]) in extras


def test_what_troubleshooting_quotes_is_said_by_the_source():
    said = " ".join(
        "".join(
            str(part.value) if isinstance(part, ast.Constant) else "…"
            for part in (node.values if isinstance(node, ast.JoinedStr) else [node])
        )
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr)
        or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    )
    said = " ".join(said.split())
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    titles = re.findall(r"^\* \*\*(.*?)\.?\*\*", page, re.MULTILINE | re.DOTALL)
    quotes = [
        " ".join(quote.split())
        for title in titles
        for quote in re.findall(r"`(.*?)`", title, re.DOTALL)
    ]
    ours = [quote for quote in quotes if not quote.startswith(("pip", "make", "--"))]
    assert len(ours) >= 8
    for quote in ours:
        assert quote in said, quote
