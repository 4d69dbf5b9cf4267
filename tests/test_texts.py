# SPDX-License-Identifier: Apache-2.0
"""What is read as a text: its rows, its column, its bytes, and how much of it."""

import csv
import datetime
import gzip
import hashlib
import io
import itertools
import json
import shutil
import sys
from unittest.mock import patch

import datasets
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusal import refused
from test_bad_input import run
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from cmoe_hf.conversion import evaluate
from cmoe_hf.conversion.cli import app
from cmoe_hf.conversion.embedded import CALIBRATION, HELD_OUT
from cmoe_hf.conversion.measure.evaluate import quality
from cmoe_hf.conversion.source.calibration import PIECE_CHARACTERS, cut, tokenize
from cmoe_hf.conversion.source.texts import documents, hub_rows, open_text

PARAGRAPHS = CALIBRATION.read_text(encoding="utf-8").split("\n\n")
ROWS = [{"id": index, "text": text} for index, text in enumerate(PARAGRAPHS)]
LINES = "\n".join(map(json.dumps, ROWS))


def table(delimiter=",", head=("id", "text"), end="\n"):
    """The rows as CSV; cells may hold delimiters, quotes and line ends."""
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end)
    writer.writerows([head, *(row.values() for row in ROWS)])
    return file.getvalue()


def calibration_of(folder):
    """What `conversion.json` says of the text."""
    return json.loads((folder / "conversion.json").read_text())["calibration"]


def read(source):
    return "".join(open_text(source).chunks)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.JSONL", LINES),
        ("rows.ndjson", LINES),
        ("lines.json", LINES),
        ("list.json", json.dumps(ROWS, indent=1)),
        ("rows.jsonl.gz", LINES),
        ("bom.jsonl", "\ufeff" + LINES.replace("\n", "\r\n")),
        ("bom.txt", "\ufeff" + CALIBRATION.read_text(encoding="utf-8")),
        ("text.txt.gz", CALIBRATION.read_text(encoding="utf-8")),
        ("body.jsonl", LINES.replace('"text"', '"body"')),
        ("two.jsonl:body", LINES.replace('"text"', '"title": "not this", "body"')),
        ("rows.csv", table()),
        ("rows.tsv", table("\t")),
        ("semicolons.CSV", table(";")),
        ("rows.csv.gz", "\ufeff" + table(end="\r\n")),
        ("two.tsv:body", table("\t", head=("text", "body"))),
        ("body.csv", table(head=("id", "body"))),
    ],
)
def test_rows_are_read_whatever_the_file_is_called(tmp_path, name, content):
    path, raw = tmp_path / name.partition(":")[0], content.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    assert read(tmp_path / name) == CALIBRATION.read_text()


def test_rows_are_calibrated_on_like_prose(dense, carved, tmp_path):
    (tmp_path / "two.jsonl").write_text(LINES.replace('"text"', '"title": "x", "body"'))
    result = run(dense, tmp_path / "out", "--calibration", str(tmp_path / "two.jsonl:body"))
    assert result.exit_code == 0, result.stderr
    expected = {**calibration_of(carved), "source": "two.jsonl:body"}
    assert calibration_of(tmp_path / "out") == expected
    assert expected["text_is_whole"]
    assert expected["text_characters"] == len(CALIBRATION.read_text())


def test_parquet_is_read_whatever_the_case_and_the_column(tmp_path, caplog):
    texts = [PARAGRAPHS[0], None, *PARAGRAPHS[1:]]
    table = pandas.DataFrame({"n": range(len(texts)), "body": texts})
    table.to_parquet(tmp_path / "rows.PARQUET")
    assert read(tmp_path / "rows.PARQUET") == CALIBRATION.read_text()
    assert f"1 of {len(texts)} rows of rows.PARQUET" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "phrases"),
    [
        ("rows.txt", LINES, ["cannot read rows.txt: it holds rows of JSON", ".jsonl"]),
        ("rows", json.dumps(ROWS), ["it holds rows of JSON"]),
        ("one.log", LINES.partition("\n")[0], ["it holds rows of JSON"]),
        (
            "two.jsonl",
            LINES.replace('"text"', '"title": "x", "body"'),
            ["no column 'text'", "['id', 'title', 'body']", "two.jsonl:COLUMN"],
        ),
        ("two.jsonl:tail", LINES, ["no column 'tail'; it has ['id', 'text']"]),
        ("text.txt:body", "prose", ["text.txt is plain text: it has no column 'body'"]),
        ("numbers.jsonl", '{"id": 1}\n{"id": 2}', ["no column 'text'; it has ['id']"]),
        ("broken.jsonl", '{"text": "x"}\n\n{"text": ', ["row 2 of broken.jsonl"]),
        ("object.json", '{\n "data": []\n}', ["row 1 of object.json", "a list of objects"]),
        ("strings.json", '["one", "two"]', ["row 1 of strings.json", 'it is "one", not an object']),
        ("empty.txt", "", ["empty.txt is empty"]),
        ("empty.jsonl", "\n", ["empty.jsonl is empty"]),
        ("empty.json", "[]", ["empty.json is empty"]),
        ("latin.txt", b"ab\n" * 10 + b"\xe9t", ["cannot read latin.txt", "not UTF-8"]),
        ("late.txt", b"a\xc3\xa9" * 500_000 + b"\xe9", ["cannot read late.txt", "not UTF-8"]),
        ("latin.csv", b"text\nab\n\xe9t", ["latin.csv: invalid continuation", "not UTF-8"]),
        ("wide.txt", "hello".encode("utf-16-le"), ["NUL byte", "not UTF-8"]),
        ("nul.jsonl", b'{"text": "a\0"}', ["row 1 of nul.jsonl: Invalid control character"]),
        ("more.csv", "text,id\na,1\nb,2,3\n", ["row 2 of more.csv: it has more cells"]),
        ("open.csv", 'text,id\na,1\n"b,2\n', ["row 2 of open.csv: unexpected end of data"]),
        ("two.csv", "title,body\na,b\n", ["no column 'text'", "['title', 'body']", "two.csv:COL"]),
        ("numbers.tsv", "n\tm\n1\t2\n", ["no column 'text'"]),
        ("head.csv", "text\n", ["head.csv is empty"]),
        ("gaps.csv", "text,id\n,1\n", ["no row of gaps.csv has text", "row 1 has null"]),
        (
            "torn.jsonl.gz",
            gzip.compress(LINES.encode())[:-20],
            ["torn.jsonl.gz: Compressed file ended before"],
        ),
        ("not.parquet", "not this", ["not.parquet: Parquet magic bytes not found"]),
        ("gone.jsonl:body", None, ["there is no text file"]),
        ("folder", ..., ["is a folder, not a text"]),
    ],
)
def test_what_is_no_text_is_refused(dense, no_leftovers, tmp_path, name, content, phrases):
    path = tmp_path / name.partition(":")[0]
    if content is ...:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    refused(run(dense, no_leftovers, "--calibration", str(tmp_path / name)), 2, *phrases)


def test_prose_that_only_begins_like_json_stays_prose(tmp_path):
    (tmp_path / "about.txt").write_text('{"a": 1} is an object.\n')
    assert read(tmp_path / "about.txt") == '{"a": 1} is an object.\n'


def holes(at):
    """Rows with a null, a number, half a character and a missing text from some row on."""
    values = [{"text": None}, {"text": 7}, {"text": "\ud800"}, {"id": 5}]
    return [*ROWS[:at], *values, *ROWS[at:]]


@pytest.mark.parametrize("at", [0, len(ROWS)])
def test_rows_without_text_are_skipped_and_counted(tmp_path, caplog, at):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, holes(at))))
    assert read(path) == CALIBRATION.read_text()
    [warning] = [it.getMessage() for it in caplog.records if it.name.endswith("texts")]
    assert warning.startswith(f"4 of {len(ROWS) + 4} rows of rows.jsonl have no text")
    assert f"row {at + 1} has null" in warning


def test_rows_without_text_through_the_library_of_the_hub(tmp_path, caplog):
    """It knows local files, too, so that nothing has to be fetched."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "one", "n": 1}\n{"body": null, "n": 2}\n{"body": "two", "n": 3}\n')
    rows = hub_rows("org/rows", path="json", data_files=str(path), split="train")
    assert "".join(documents(rows, None, "org/rows", "")) == "one\n\ntwo"
    assert "1 of 3 rows of org/rows" in caplog.text and "'body' is read" in caplog.text


@pytest.mark.parametrize("value", [None, ["a"]])
def test_no_row_with_text_is_refused(dense, no_leftovers, tmp_path, value):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps({"text": value}) + "\n" + json.dumps({"text": value}))
    phrase = f"no row of rows.jsonl has text in its column 'text': row 1 has {json.dumps(value)}"
    refused(run(dense, no_leftovers, "--calibration", str(path)), 2, phrase)


def test_a_column_of_dates_is_refused(dense, no_leftovers, tmp_path):
    pandas.DataFrame({"text": [datetime.date(2026, 1, 2)]}).to_parquet(tmp_path / "dates.parquet")
    result = run(dense, no_leftovers, "--calibration", str(tmp_path / "dates.parquet"))
    refused(result, 2, "no row of dates.parquet has text", 'row 1 has "2026-01-02"')


def test_local_rows_need_neither_a_home_nor_a_cache(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(LINES)
    monkeypatch.setenv("HOME", "/dev/null/x")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/dev/null/x")
    assert read(tmp_path / "rows.jsonl") == CALIBRATION.read_text()


def sized(path, characters):
    """A text of at least so many characters, of different paragraphs."""
    with path.open("w", encoding="utf-8") as file:
        written = number = 0
        while written < characters:
            written += file.write(f"Part {number}.\n\n{CALIBRATION.read_text(encoding='utf-8')}\n")
            number += 1
    return path


def test_of_a_large_text_only_a_prefix_is_calibrated_on(dense, tmp_path, monkeypatch, caplog):
    text = sized(tmp_path / "large.txt", 1_500_000)
    for module in ("plan", "source.calibration"):
        place = sys.modules[f"cmoe_hf.conversion.{module}"]
        monkeypatch.setattr(place, "WHOLE_CHARACTERS", 1_200_000)
    given, call = [], PreTrainedTokenizerFast.__call__

    def count(tokenizer, text, *arguments, **options):
        given.append(len(text))
        return call(tokenizer, text, *arguments, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", count)
    assert run(dense, tmp_path / "out", "--calibration", str(text)).exit_code == 0
    assert sum(given[:2]) == 1_200_000 and given[0] <= PIECE_CHARACTERS
    assert "only the first 1,200,000 characters of large.txt are read" in caplog.text
    calibration = calibration_of(tmp_path / "out")
    prefix = text.read_text(encoding="utf-8")[:1_200_000]
    assert calibration["sha256"] == hashlib.sha256(prefix.encode()).hexdigest()
    assert calibration["text_characters"] == 1_200_000 and not calibration["text_is_whole"]


def test_of_a_quick_look_no_more_is_read_than_it_takes(dense, tmp_path):
    text = sized(tmp_path / "large.txt", 4_000_000)
    with text.open("ab") as file:
        file.write(b"\xff")  # whoever reads so far is refused
    command = ["evaluate", dense, "--text", text, "--sequence-length", 64, "--json"]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 2 and "cannot read large.txt" in result.stderr
    result = CliRunner().invoke(app, [*map(str, command), "--windows", "5"])
    assert result.exit_code == 0, result.stderr
    few = json.loads(result.stdout)
    assert few["tokens"] == 5 * 63 and few["windows"] == 5
    ids = tokenize(AutoTokenizer.from_pretrained(dense), text.read_bytes()[:20_000].decode())
    windows_WL = ids[: 5 * 64].view(5, 64)
    model = AutoModelForCausalLM.from_pretrained(dense)
    assert few["perplexity"] == pytest.approx(quality(model, windows_WL).perplexity, rel=1e-5)


def pieces_of(text, whole, size):
    """By `cut`, however the text arrives."""
    ways = [[text], list(text), [text[i : i + 7] for i in range(0, len(text), 7)]]
    with patch("cmoe_hf.conversion.source.calibration.PIECE_CHARACTERS", size):
        [pieces] = {tuple(cut(iter(chunks), whole)) for chunks in ways}
    return pieces


@given(st.text("ab \n", max_size=80), st.integers(5, 20), st.integers(5, 40))
def test_pieces_are_the_text_whatever_the_chunks(text, size, whole):
    pieces = pieces_of(text, whole, size)
    assert "".join(pieces) == text
    if len(text) < whole:
        assert len(pieces) <= 1
    else:
        assert all(0 < len(piece) <= size for piece in pieces)
        for piece, after in itertools.pairwise(pieces):
            if "\n" in piece:
                assert piece.endswith("\n")
            elif " " in piece[1:]:
                assert after.startswith(" ")


def test_a_long_text_measures_in_pieces_and_says_so(dense, tmp_path, monkeypatch, caplog):
    text = tmp_path / "text.txt"
    text.write_text(HELD_OUT.read_text(encoding="utf-8")[:20_000])
    whole = evaluate(dense, text=text, sequence_length=64)
    assert not [it for it in caplog.records if "pieces" in it.getMessage()]
    monkeypatch.setattr("cmoe_hf.conversion.source.calibration.WHOLE_CHARACTERS", 10_000)
    monkeypatch.setattr("cmoe_hf.conversion.source.calibration.PIECE_CHARACTERS", 3_000)
    pieces = evaluate(dense, text=text, sequence_length=64)
    assert "text.txt has 10,000 characters or more: it is tokenised in pieces" in caplog.text
    assert pieces.perplexity == pytest.approx(whole.perplexity, rel=0.02)
    assert abs(pieces.tokens - whole.tokens) <= 63


def test_the_first_windows_are_told_in_the_card(carved, tmp_path):
    folder = shutil.copytree(carved, tmp_path / "mine")
    command = ["evaluate", folder, "--text", HELD_OUT, "--sequence-length", 64, "--windows", 3]
    result = CliRunner().invoke(app, [*map(str, command), "--card", "--json"])
    assert result.exit_code == 0, result.stderr
    [record] = json.loads((folder / "evaluation.json").read_text())["results"]
    assert record["windows"] == 3 and record["tokens"] == 3 * 63
    assert "first 3 windows only" in (folder / "README.md").read_text()
    command[-1] = 0
    refused(CliRunner().invoke(app, list(map(str, command))), 2, "--windows is 0")
    command = ["evaluate", folder, "--tasks", "piqa", "--windows", 3]
    refused(CliRunner().invoke(app, list(map(str, command))), 2, "--windows is for perplexity")
