"""What is read as a text: its rows, its column, its bytes, and how much of it."""

import datetime
import gzip
import json
import os
import subprocess
import sys

import pandas
import pytest
from refusal import refused
from test_bad_input import run

from cmoe_hf.conversion.demo import CALIBRATION
from cmoe_hf.conversion.texts import documents, hub_rows

SHAPE = {"shared": 2, "active": 2, "experts": 8, "samples": 4, "sequence_length": 64}
PARAGRAPHS = CALIBRATION.read_text(encoding="utf-8").split("\n\n")
ROWS = [{"id": index, "text": text} for index, text in enumerate(PARAGRAPHS)]
LINES = "\n".join(map(json.dumps, ROWS))


def calibration_of(folder):
    """What `conversion.json` says of the text."""
    return json.loads((folder / "conversion.json").read_text())["calibration"]


@pytest.fixture(scope="module")
def prose(carved):
    """The SHA-256 of the text as prose."""
    return calibration_of(carved)["sha256"]


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
    ],
)
def test_rows_are_read_whatever_the_file_is_called(dense, tmp_path, prose, name, content):
    path = tmp_path / name.partition(":")[0]
    raw = content.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    result = run(dense, tmp_path / "out", "--calibration", str(tmp_path / name))
    assert result.exit_code == 0, result.stderr
    told = calibration_of(tmp_path / "out")
    assert told["sha256"] == prose
    assert told["source"] == name
    assert told["text_is_whole"] and told["text_characters"] == len(CALIBRATION.read_text())


def test_parquet_is_read_whatever_the_case_and_the_column(dense, tmp_path, prose):
    pandas.DataFrame({"n": range(len(PARAGRAPHS)), "body": PARAGRAPHS}).to_parquet(
        tmp_path / "rows.PARQUET"
    )
    result = run(dense, tmp_path / "out", "--calibration", str(tmp_path / "rows.PARQUET"))
    assert result.exit_code == 0, result.stderr
    assert calibration_of(tmp_path / "out")["sha256"] == prose


@pytest.mark.parametrize(
    ("name", "content", "phrases"),
    [
        ("rows.txt", LINES, ["rows.txt holds rows of JSON", "rows.jsonl"]),
        ("rows", json.dumps(ROWS), ["rows holds rows of JSON"]),
        ("one.log", LINES.partition("\n")[0], ["one.log holds rows of JSON"]),
        (
            "two.jsonl",
            LINES.replace('"text"', '"title": "x", "body"'),
            ["no column 'text'", "['id', 'title', 'body']", "two.jsonl:COLUMN"],
        ),
        ("two.jsonl:tail", LINES, ["no column 'tail'; it has ['id', 'text']"]),
        ("text.txt:body", "prose", ["text.txt is plain text: it has no column 'body'"]),
        ("numbers.jsonl", '{"id": 1}\n{"id": 2}', ["no column 'text'; it has ['id']"]),
        ("broken.jsonl", '{"text": "x"}\n\n{"text": ', ["line 3 of broken.jsonl"]),
        ("object.json", '{\n "data": []\n}', ["line 1 of object.json", "a list of objects"]),
        ("strings.json", '["one", "two"]', ["row 1 of strings.json is not an object", '"one"']),
        ("empty.txt", "", ["empty.txt is empty"]),
        ("empty.jsonl", "\n", ["empty.jsonl is empty"]),
        ("empty.json", "[]", ["empty.json is empty"]),
        ("latin.txt", b"ab\n" * 10 + b"\xe9t", ["latin.txt is not UTF-8", "byte 30 (0xe9)"]),
        ("late.txt", b"a\xc3\xa9" * 500_000 + b"\xe9", ["at byte 1500000 (0xe9)"]),
        ("cut.txt", b"ab\xc3", ["cut.txt is not UTF-8", "byte 2 (0xc3)"]),
        ("wide.txt", "hello".encode("utf-16"), ["wide.txt is not plain text", "NUL byte at"]),
        ("nul.jsonl", b'{"text": "a\0"}', ["NUL byte at offset 11"]),
        ("torn.jsonl.gz", gzip.compress(LINES.encode())[:-20], ["cannot read torn.jsonl.gz"]),
        ("not.parquet", "not this", ["not.parquet is not a whole Parquet file"]),
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


def test_prose_that_only_begins_like_json_stays_prose(dense, tmp_path):
    path = tmp_path / "about.txt"
    path.write_text('{"a": 1} is an object.\n' + CALIBRATION.read_text())
    result = run(dense, tmp_path / "out", "--calibration", str(path))
    assert result.exit_code == 0, result.stderr


def holes(at):
    """Rows with a null, a number, half a character and a missing text from some row on."""
    values = [{"text": None}, {"text": 7}, {"text": "\ud800"}, {"id": 5}]
    return [*ROWS[:at], *values, *ROWS[at:]]


@pytest.mark.parametrize("at", [0, 3, len(ROWS)])
def test_rows_without_text_are_skipped_and_counted(dense, tmp_path, prose, caplog, at):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, holes(at))))
    result = run(dense, tmp_path / "out", "--calibration", str(path))
    assert result.exit_code == 0, result.stderr
    assert calibration_of(tmp_path / "out")["sha256"] == prose
    [warning] = [it.getMessage() for it in caplog.records if it.name.endswith("texts")]
    assert warning.startswith(f"4 of {len(ROWS) + 4} rows of rows.jsonl have no text")
    assert f"line {at + 1} has null" in warning


def test_rows_without_text_through_the_library_of_the_hub(tmp_path, caplog):
    """It knows local files, too, so that nothing has to be fetched."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "one", "n": 1}\n{"body": null, "n": 2}\n{"body": "two", "n": 3}\n')
    rows = hub_rows({"path": "json", "data_files": str(path), "split": "train"}, "org/rows")
    assert list(documents(rows, None, "org/rows", "")) == ["one", "two"]
    assert "1 of 3 rows of org/rows" in caplog.text and "'body' is read" in caplog.text


def test_rows_without_text_in_parquet(dense, tmp_path, prose, caplog):
    texts = [PARAGRAPHS[0], None, *PARAGRAPHS[1:]]
    pandas.DataFrame({"text": texts}).to_parquet(tmp_path / "rows.parquet")
    result = run(dense, tmp_path / "out", "--calibration", str(tmp_path / "rows.parquet"))
    assert result.exit_code == 0, result.stderr
    assert calibration_of(tmp_path / "out")["sha256"] == prose
    assert f"1 of {len(texts)} rows of rows.parquet" in caplog.text


@pytest.mark.parametrize("value", [None, 7, True, ["a"]])
def test_no_row_with_text_is_refused(dense, no_leftovers, tmp_path, value):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps({"text": value}) + "\n" + json.dumps({"text": value}))
    phrase = f"no row of rows.jsonl has text in its column 'text': line 2 has {json.dumps(value)}"
    refused(run(dense, no_leftovers, "--calibration", str(path)), 2, phrase)


def test_a_column_of_dates_is_refused(dense, no_leftovers, tmp_path):
    pandas.DataFrame({"text": [datetime.date(2026, 1, 2)]}).to_parquet(tmp_path / "dates.parquet")
    result = run(dense, no_leftovers, "--calibration", str(tmp_path / "dates.parquet"))
    refused(result, 2, "no row of dates.parquet has text", 'row 1 has "2026-01-02"')


def test_local_rows_need_neither_a_home_nor_a_cache(dense, tmp_path, prose):
    (tmp_path / "rows.jsonl").write_text(LINES)
    nowhere = dict.fromkeys(("HOME", "HF_HOME", "HF_DATASETS_CACHE"), "/dev/null/x")
    command = [sys.executable, "-m", "cmoe_hf.conversion.cli", "convert", dense, tmp_path / "out"]
    options = {name.replace("_", "-"): value for name, value in SHAPE.items()}
    options["calibration"] = tmp_path / "rows.jsonl"
    command += [part for name, value in options.items() for part in (f"--{name}", value)]
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, **nowhere},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert calibration_of(tmp_path / "out")["sha256"] == prose
