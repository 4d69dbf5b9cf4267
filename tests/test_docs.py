# SPDX-License-Identifier: Apache-2.0
"""The pages: their tables, links, lengths, and the commands, files and names in them."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from cmoe_hf.conversion.cli import app
from cmoe_hf.modeling_cmoe import TESTED

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
SOURCES = [*(ROOT / "src").rglob("*.py"), *(ROOT / "conversion").rglob("*.py")]
EXAMPLES = [path for path in (ROOT / "examples").iterdir() if path.is_file()]
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
OPTIONS = {
    name: {option for parameter in command.params for option in parameter.opts}
    | {option for parameter in command.params for option in parameter.secondary_opts}
    | {"--help"}
    for name, command in typer.main.get_command(app).commands.items()
}
PASSES_OPTIONS_ON = {"serve"}
ELSEWHERE = {"--version", "--require-hashes", "--dist"}
"""Options of other programs that pages name by themselves."""


def read(path):
    return path.read_text(encoding="utf-8")


def relative(path):
    return path.relative_to(ROOT).as_posix()


def anchors(page):
    """What GitHub and the site call the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", read(page)), re.MULTILINE)
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
    text = FENCE.sub("", read(page))
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def inline(text):
    """Code within sentences, each on one line."""
    found = re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", text))
    return [" ".join(code.split()) for code in found]


def commands(text):
    """Lines of code blocks, continued lines joined, and code within sentences."""
    blocks = "\n".join(FENCE.findall(text)).replace("\\\n", " ")
    lines = blocks.splitlines() + inline(text)
    return [part for line in lines for part in re.split(r"&&|\|\||(?<=\s)\|(?=\s)", line)]


def said_in(path):
    """What a page says, or the docstring of an example."""
    text = read(path)
    if path.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
        return re.sub(r"\n\n((?:    .*\n?)+)", r"\n\n```\n\1\n```\n", said)
    return text


def unknown_options(line):
    """Options of a command line that our command, or the example, does not have."""
    if called := re.search(r"(?<![\w./-])cmoe ([a-z]+)\b(.*)", line):
        name, rest = called.groups()
        return set() if name in PASSES_OPTIONS_ON else set(OPTION.findall(rest)) - OPTIONS[name]
    if called := re.search(r"examples/(\w+\.py)\b(.*)", line):
        script = read(ROOT / "examples" / called[1])
        accepted = re.findall(r"add_argument\(\s*\"(--[\w-]+)", script)
        return set(OPTION.findall(called[2])) - {*accepted, "--help"}
    return set()


def test_figures_that_changed_are_marked(tmp_path):
    """By `make tables`, on tables whose commands take no time."""
    copy = tmp_path / "results"
    copy.mkdir()
    for path in (ROOT / "results").glob("*.py"):
        (copy / path.name).write_bytes(path.read_bytes())
    about = {
        "part_of": "b",
        "columns": ["", "x", "y"],
        "rows": [["a", 2, "**1.5** (1.2\N{EN DASH}1.8)"]],
    }
    places = [[0, 1, "found.0"], [0, 2, "found.1"]]
    steps = [
        {"command": "echo begun && echo '{\"found\": [2.1, 1.9]}'", "cells": places},
        {"command": "exit 3", "cells": []},
    ]
    (copy / "a.json").write_text(json.dumps({**about, "rerun": {"within": 0.1, "steps": steps}}))
    absent = {"needs": ["model"], "within": 0.1, "steps": steps}
    (copy / "b.json").write_text(json.dumps({**about, "rerun": absent}))
    done = subprocess.run([sys.executable, copy / "rerun.py"], capture_output=True, text=True)
    rows = [line.strip("| ").split(" | ") for line in done.stdout.strip().splitlines()[2:]]
    assert rows == [
        ["a", "a, x", "2", "2.1", "same"],
        ["a", "a, y", "**1.5** (1.2\N{EN DASH}1.8)", "1.9", "**changed**"],
        ["a", "failed: exit 3: exit status 3", "", "", "**changed**"],
        ["b", "left out: model not in DATA"],
    ]


def test_what_is_run_again_exists():
    for path in (ROOT / "results").glob("*.json"):
        table = json.loads(read(path))
        for step in table.get("rerun", {}).get("steps", []):
            assert not [it for line in step["command"].split("&&") if (it := unknown_options(line))]
            for row, column, _ in step["cells"]:
                assert re.search(r"\d", str(table["rows"][row][column])), (path.name, row, column)


@pytest.mark.parametrize("path", [*PAGES, *EXAMPLES], ids=relative)
def test_commands_have_the_options_that_are_written(path):
    if path.name == "CHANGELOG.md":  # it tells of options of their day
        return
    said = said_in(path)
    assert not {line: lacks for line in commands(said) if (lacks := unknown_options(line))}
    known = set().union(*OPTIONS.values(), ELSEWHERE, *map(OPTION.findall, map(read, EXAMPLES)))
    for code in inline(said):
        assert not code.startswith("--") or set(OPTION.findall(code)) <= known, code


def test_an_option_that_a_command_lacks_is_noticed():
    sentence = "See\n`cmoe benchmark\nOUT --windows 8`.\n\n"
    block = "```bash\ncmoe demo --oh \\\n  --no && examples/quantise.py --dtype int8\n```\n"
    lacks = [unknown_options(line) for line in commands(sentence + block)]
    assert [it for it in lacks if it] == [{"--oh", "--no"}, {"--dtype"}, {"--windows"}]


def test_the_table_of_options_is_complete():
    page = read(ROOT / "docs" / "convert.md")
    table = re.findall(r"^\| `(--[\w-]+)", page.partition("## Options")[2], re.MULTILINE)
    assert set(table) == OPTIONS["convert"] - {"--help", "--debug", "model", "out"}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_targets_files_and_functions_exist(page):
    text, makefile = read(page), read(ROOT / "Makefile")
    names = {path.name for path in [*SOURCES, *EXAMPLES, *ROOT.glob("*"), *PAGES]}
    names |= {path.name for folder in ("tests", "results") for path in (ROOT / folder).iterdir()}
    for line in commands(text):
        for target in re.findall(r"^make ([a-z]+)", line):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), line
    if page.name == "CHANGELOG.md":
        return
    for code in inline(text.replace("NAME", "*")):
        if re.fullmatch(
            r"(tests|examples|src|conversion|docs|results|requirements|\.ci)/[\w./-]*", code
        ):
            assert (ROOT / code).exists(), code
        elif re.fullmatch(r"\w+\.(py|sh)", code):
            assert code in names, code
        elif named := re.fullmatch(r"([a-z_]+)\.([a-z_]{5,})", code):
            defined = re.compile(
                rf"^ *(def|class) {named[2]}\b|^ *{named[2]}\b.*[:=]", re.MULTILINE
            )
            modules = [path for path in SOURCES if path.stem == named[1]]
            assert not modules or any(defined.search(read(path)) for path in modules), code


def test_versions_in_prose_are_those_of_the_code():
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    [bounds] = [it for it in project["dependencies"] if it.startswith("transformers")]
    lowest, highest = re.findall(r"\d+\.\d+", bounds)
    assert TESTED[0].startswith(lowest)
    assert TESTED[1].startswith(f"5.{int(highest.partition('.')[2]) - 1}")
    assert f"newer than {TESTED[1]}" in read(ROOT / "docs" / "load.md")
    assert f"Python {project['requires-python'].strip('>=')} or newer" in read(ROOT / "README.md")


def test_no_page_is_too_long():
    long = {page.name: len(read(page).splitlines()) for page in PAGES}
    assert long["README.md"] <= 110
    assert not {name: lines for name, lines in long.items() if lines > 250}


def test_there_is_one_way_to_install():
    extras = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    extras = extras["optional-dependencies"].keys()
    texts = [*PAGES, *SOURCES, *(ROOT / "examples").iterdir()]
    for path in texts:
        text = read(path)
        if path.name != "troubleshooting.md":  # which says that this is not the way
            assert not re.search(r"pip install \W*cmoe-hf", text), path.name
        for extra in re.findall(r"pip install '?\.\[(\w+)\]", text):
            assert extra in extras, (path.name, extra)
    for path in SOURCES:  # those that errors name
        for node in ast.walk(ast.parse(read(path))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "missing":
                assert ast.literal_eval(node.args[1]) in extras


def test_what_troubleshooting_quotes_is_said_by_the_source():
    said = " ".join(
        "".join(
            str(part.value) if isinstance(part, ast.Constant) else "…"
            for part in (node.values if isinstance(node, ast.JoinedStr) else [node])
        )
        for path in SOURCES
        for node in ast.walk(ast.parse(read(path)))
        if isinstance(node, ast.JoinedStr)
        or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    )
    said = " ".join(said.split())
    page = read(ROOT / "docs" / "troubleshooting.md")
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
