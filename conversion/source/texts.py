# SPDX-License-Identifier: Apache-2.0
"""Where texts come from: files and data sets, read bit by bit, only as far as they are wanted."""

import codecs
import gzip
import io
import json
import logging
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, TypeGuard

from datasets import load_dataset
from pyarrow import ArrowException
from pyarrow.parquet import ParquetFile

from ..errors import CMoEError, RequestError

logger = logging.getLogger(__name__)

DATASETS: dict[str, dict[str, dict[str, Any]]] = {
    "wikitext2": {
        "train": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"},
        "test": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"},
    },
    "c4": {
        "train": {
            "path": "allenai/c4",
            "data_files": "en/c4-train.00000-of-01024.json.gz",
            "split": "train",
        },
        "test": {
            "path": "allenai/c4",
            "data_files": "en/c4-validation.00000-of-00008.json.gz",
            "split": "train",
        },
    },
}
"""Short names; each has a part to calibrate on and a part to measure on."""

JSON_FORMATS = (".json", ".jsonl", ".ndjson")
TABLE_FORMATS = (*JSON_FORMATS, ".parquet")
MAX_DOCUMENTS = 100_000
"""Documents read from a Hub data set; they are streamed, so that C4 is not downloaded whole."""
BLOCK = 1 << 20
"""Bytes of a file, or characters of a document, that are handled at once."""
PEEKED_ROWS = 100
"""Rows that say which columns a table has, and which of them hold text."""

Row = tuple[str, Any]
"""Where a row is, in words, and what it is."""


@dataclass(frozen=True)
class Text:
    """A source that was found and begins well. It can be read once."""

    name: str
    """As it may be told to others: a file by its bare name."""
    chunks: Generator[str]
    """The characters. Raises `RequestError` where they cannot be read."""


def open_text(source: str | Path, *, part: str = "train") -> Text:
    """Find a text and read its beginning; documents are joined by a blank line.

    `source` is a file, `wikitext2`, `c4`, or `dataset[:subset][:split][:column]` of the Hub. Rows
    of `.jsonl`, `.ndjson`, `.json` (also a list of rows) and `.parquet` files give their column
    `text`, or the only one of strings, or the one named in `FILE:COLUMN`; rows without a string
    there are skipped and counted. Any other file is plain UTF-8. All of them may be gzipped.
    `part` is `"train"` or `"test"` and matters for the short names only.

    Raises `RequestError` for a source that does not exist or has no text, `CMoEError` for one
    that cannot be reached.
    """
    found, name = find_file(source), str(source)
    if found is not None:
        path, column = found
        name = path.name
        kind = kind_of(path)
        if kind in TABLE_FORMATS:
            rows = json_rows(path) if kind in JSON_FORMATS else parquet_rows(path)
            how = f"name one after a colon: {name}:COLUMN"
            chunks = joined(documents(rows, column, name, how))
        elif column is not None:
            raise RequestError(f"{name} is plain text: it has no column {column!r}.")
        else:
            chunks = prose(path)
    elif name in DATASETS:
        chunks = joined(documents(hub_rows(DATASETS[name][part], name), "text", name, ""))
    else:
        refuse_path(Path(source).expanduser(), name)
        dataset, subset, split, column = (*name.split(":"), "", "", "", "")[:4]
        arguments = {"path": dataset, "name": subset or None, "split": split or part}
        how = f"name one: {dataset}:SUBSET:SPLIT:COLUMN"
        chunks = joined(documents(hub_rows(arguments, name), column or None, name, how))
    first = next((chunk for chunk in chunks if chunk), None)
    if first is None:
        raise RequestError(f"{name} is empty: give a file or data set with text in it.")
    return Text(text_name(source), _from(first, chunks))


def _from(first: str, others: Iterator[str]) -> Generator[str]:
    """A generator, so that it can be closed and a table then tells what it skipped."""
    yield first
    yield from others


def find_file(source: str | Path) -> tuple[Path, str | None] | None:
    """The file that a source is, and the column that it names; None if it is no file."""
    front, colon, column = str(source).rpartition(":")
    for name, named in ((str(source), None), (front if colon else "", column)):
        path = Path(name).expanduser()
        if path.is_file():
            return path, named
    return None


def text_file(source: str | Path | None) -> Path | None:
    """The file that a source is, if it is one."""
    found = None if source is None else find_file(source)
    return None if found is None else found[0]


def text_name(source: str | Path) -> str:
    """A source as it may be told to others: a file by its bare name."""
    return Path(source).name if find_file(source) is not None else str(source)


def absolute_text(source: str | Path) -> str:
    """The same source, wherever the process will be."""
    found = find_file(source)
    if found is None:
        return str(source)
    path, column = found
    return str(path.absolute()) + ("" if column is None else f":{column}")


def kind_of(path: Path) -> str:
    """The suffix that tells a file's format, in lower case and without `.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix != ".gz"), "")


def refuse_path(path: Path, name: str) -> None:
    """Raises `RequestError` if what is no file was meant to be one."""
    if path.is_dir():
        raise RequestError(f"{name} is a folder, not a text: give one of its files.")
    looks_local = path.is_absolute() or name.startswith((".", "~"))
    if looks_local or kind_of(Path(name.partition(":")[0])) in (".txt", ".md", *TABLE_FORMATS):
        raise RequestError(f"there is no text file {name}.")


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """A file's bytes, unpacked. Raises `RequestError` if they cannot be read."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise RequestError(f"cannot read {path.name}: {error}.") from error


def characters(path: Path) -> Iterator[str]:
    """A UTF-8 file with every line ended by a line feed, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0
    with opened(path) as file:
        while True:
            block = file.read(BLOCK)
            if offset == 0 and block.startswith(codecs.BOM_UTF8):
                block, offset = block[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
            pending = len(decoder.getstate()[0])
            nul = block.find(b"\0")
            if nul >= 0:
                raise RequestError(
                    f"{path.name} is not plain text: there is a NUL byte at offset {offset + nul}. "
                    "Convert it to UTF-8, for example with iconv."
                )
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = offset - pending + error.start
                raise RequestError(
                    f"{path.name} is not UTF-8 text: {error.reason} at byte {at} "
                    f"(0x{error.object[error.start]:02x}). Convert it, for example with iconv."
                ) from error
            yield newlines.decode(text, final=not block)
            if not block:
                return
            offset += len(block)


def prose(path: Path) -> Iterator[str]:
    """A file of plain text. Raises `RequestError` for rows of JSON: they would be read as prose."""
    chunks = characters(path)
    head = next(chunks)
    if begins_with_rows(head):
        raise RequestError(
            f"{path.name} holds rows of JSON, whose braces and keys would be read as prose. Name "
            f"it {path.stem}.jsonl, and the text in its rows will be read."
        )
    return chain([head], chunks)


def begins_with_rows(head: str) -> bool:
    """Whether a text is a JSON object, followed by nothing or another, or a list of objects."""
    head = head.lstrip()
    is_list = head.startswith("[")
    head = head[is_list:].lstrip()
    try:
        row, end = json.JSONDecoder().raw_decode(head)
    except (ValueError, RecursionError):
        return False
    rest = head[end:].lstrip()
    return isinstance(row, dict) and (not rest or rest[0] in (",]" if is_list else "{"))


def json_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSON file: one a line, or the members of one list, which is read whole."""
    chunks = characters(path)
    head = next((chunk for chunk in chunks if chunk.strip()), "")
    if head.lstrip().startswith("["):
        rows = parsed("".join([head, *chunks]), path.name, "the list")
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(lines(chain([head], chunks)), 1):
        if line.strip():
            yield f"line {number}", parsed(line, path.name, f"line {number}")


def parsed(text: str, name: str, place: str) -> Any:
    """JSON as data. Raises `RequestError` if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"{place} of {name} is not valid JSON ({error}): each line must be an object, or the "
            "file a list of objects."
        ) from error


def lines(chunks: Iterator[str]) -> Iterator[str]:
    """Lines without their ends. Not `splitlines`: JSON may hold what that takes for line ends."""
    rest = ""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split("\n")
        yield from whole
    yield rest


def parquet_rows(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file."""
    number = 0
    with opened(path) as file:
        try:
            for batch in ParquetFile(file).iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
        except ArrowException as error:
            reason = str(error).partition("\n")[0]
            raise RequestError(f"{path.name} is not a whole Parquet file: {reason}") from error


def hub_rows(arguments: Mapping[str, Any], name: str) -> Iterator[Row]:
    """The first rows of a Hub data set, streamed."""
    try:
        rows = islice(load_dataset(**arguments, streaming=True), MAX_DOCUMENTS)
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
    except (ConnectionError, TimeoutError) as error:
        raise CMoEError(
            f"cannot reach the data set {name}: {error}. Give a local text file instead."
        ) from error
    except Exception as error:  # load_dataset has no common base class for its errors
        raise RequestError(
            f"cannot read {name} as a data set: {error}. Give a local file (.txt, .jsonl, "
            ".parquet), wikitext2, c4, or dataset[:subset][:split][:column]."
        ) from error


def documents(rows: Iterator[Row], column: str | None, name: str, how: str) -> Iterator[str]:
    """The texts of a table; rows that have none are counted in one warning.

    Raises `RequestError` if no row has one, or `column` and table do not say which column it is;
    `how` tells the user to do so.
    """
    head = list(islice(rows, PEEKED_ROWS))
    if not head:
        return
    column = column_of(head, column, name, how)
    total = skipped = 0
    first = ""
    try:
        for place, row in chain(head, rows):
            total += 1
            value = columns_of(place, row, name).get(column)
            if is_text(value):
                yield value
            else:
                skipped += 1
                first = first or f"{place} has {json.dumps(value, default=str)[:40]}"
    except GeneratorExit:  # enough was read
        pass
    else:
        if skipped == total:
            raise RequestError(f"no row of {name} has text in its column {column!r}: {first}.")
    if skipped:
        logger.warning(
            "%d of %d rows of %s have no text in their column %r and were skipped: %s.",
            *(skipped, total, name, column, first),
        )


def columns_of(place: str, row: Any, name: str) -> Mapping[str, Any]:
    """A row as columns. Raises `RequestError` if it has none."""
    if not isinstance(row, Mapping):
        raise RequestError(
            f"{place} of {name} is not an object with columns but {json.dumps(row)[:40]}: write "
            '{"text": ...} for each document.'
        )
    return row


def column_of(head: Sequence[Row], column: str | None, name: str, how: str) -> str:
    """The column to read: as named, or `text`, or the only one that holds strings."""
    rows = [columns_of(place, row, name) for place, row in head]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    wanted = column or "text"
    if wanted in columns:
        return wanted
    holding = [key for key in columns if any(isinstance(row.get(key), str) for row in rows)]
    if column is None and len(holding) == 1:
        logger.warning(
            "%s has no column 'text': %r is read, the only one that holds strings.",
            *(name, holding[0]),
        )
        return holding[0]
    hint = f" To read another, {how}." if how else ""
    raise RequestError(f"{name} has no column {wanted!r}; it has {columns}.{hint}")


def is_text(value: Any) -> TypeGuard[str]:
    """Whether it is a string that can be encoded: JSON can write halves of characters."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def joined(texts: Iterator[str]) -> Iterator[str]:
    """Documents with a blank line between them."""
    for number, text in enumerate(texts):
        yield f"\n\n{text}" if number else text
