# SPDX-License-Identifier: Apache-2.0
"""Texts from files and data sets, read only as far as they are needed."""

import csv
import gzip
import json
import logging
import re
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from datasets import load_dataset
from pyarrow import ArrowException
from pyarrow.parquet import ParquetFile

from ..errors import CMoEError, RequestError
from .hub import public_name

logger = logging.getLogger(__name__)

WIKITEXT, C4 = "Salesforce/wikitext:wikitext-2-raw-v1", "allenai/c4:en"
DATASETS = {
    "wikitext2": {"train": f"{WIKITEXT}:train", "test": f"{WIKITEXT}:test"},
    "c4": {"train": f"{C4}:train", "test": f"{C4}:validation"},
}
"""Short names; each has a part to calibrate on and a part to measure on."""
MAX_DOCUMENTS = 100_000
"""Documents read from a Hub data set; they are streamed, so that C4 is not downloaded whole."""
BLOCK = 1 << 20
"""Characters that are read at once."""
PEEKED_ROWS = 100
"""Rows that tell which columns a table has, and which of them hold text."""
READ_ERRORS = (OSError, EOFError, ValueError, RecursionError, zlib.error, csv.Error, ArrowException)
"""Of files, packed or not, and of the readers of all formats."""
HINTS = {
    UnicodeError: " It is not UTF-8: convert it, for example with iconv.",
    json.JSONDecodeError: " Each line must be an object, or the file a list of objects.",
}
"""What to do about some of them."""

OWN = "own"
"""The name of the text that the dense model writes itself."""
UNITS = {"": 1, "k": 10**3, "m": 10**6}
AMOUNT = re.compile(r"(\d+(?:\.\d+)?)([km]?)")

Row = Mapping[str, Any]


class Portion(NamedTuple):
    """So much of a text."""

    text: str
    tokens: int | None
    """As asked for; None if nothing is said."""

    @classmethod
    def of(cls, source: str | Path) -> "Portion":
        """Read `TEXT` or `TEXT:TOKENS`, as in `wikitext2:500k`. Raises `RequestError`."""
        name, _, amount = str(source).rpartition(":")
        found = AMOUNT.fullmatch(amount.lower()) if name else None
        if found is None or Path(source).expanduser().is_file():
            if name == OWN:
                raise RequestError(f"{source}: say how many tokens, for example {OWN}:500k.")
            return cls(str(source), None)
        return cls(name, int(float(found[1]) * UNITS[found[2]]))

    @property
    def absolute(self) -> str:
        """Return it as it can be read from anywhere."""
        text = self.text if self.text == OWN else absolute_text(self.text)
        return text if self.tokens is None else f"{text}:{self.tokens}"

    @property
    def name(self) -> str:
        """Return its public name."""
        return public_name(self.text)


@dataclass(frozen=True)
class Text:
    """A text whose beginning was read without errors. It can be read once."""

    name: str
    """Public name: a file's name without its path."""
    chunks: Generator[str]
    """The characters. Raises `RequestError` where they cannot be read."""


def open_text(source: str | Path, *, part: str = "train") -> Text:
    """Find a text and read its beginning; documents are joined by a blank line.

    Args:
        source: A file, `wikitext2`, `c4`, or `dataset[:subset][:split][:column]` of the Hub. Of
            JSON, CSV, TSV and Parquet files the column `text` is read, or the only one that holds
            text, or that of `FILE:COLUMN`. Any other file is plain UTF-8. Files may be gzipped.
        part: `train` or `test`; matters for data sets of the Hub only.

    Raises `RequestError` for what does not exist or holds no text, and `CMoEError` for what cannot
    be reached.
    """
    path, column = find_file(source)
    name = text_name(source)
    if path is None:
        chunks = hub_documents(str(source), part)
    elif reader := TABLES.get(kind_of(path)):
        chunks = documents(read_file(path, reader), column, path.name, f"{path.name}:COLUMN")
    elif column is None:
        chunks = read_file(path, text_blocks)
    else:
        raise RequestError(f"{path.name} is plain text: it has no column {column!r}.")
    first = next(filter(None, chunks), None)
    if first is None:
        raise RequestError(f"{name} is empty: give a text or data set that is not.")

    def read() -> Generator[str]:
        yield first
        yield from chunks

    return Text(name, read())


def find_file(source: str | Path) -> tuple[Path | None, str | None]:
    """Return the file that a source is, if it is one, and the column that it names."""
    front, _, column = str(source).rpartition(":")
    for name, named in ((source, None), (front, column)):
        if (path := Path(name).expanduser()).is_file():
            return path, named
    return None, None


def text_file(source: str | Path | None) -> Path | None:
    """Return the file that a source is, if it is one."""
    return None if source is None else find_file(source)[0]


def text_name(source: str | Path) -> str:
    """Return the public name of a source: a file's name without its path."""
    return str(source) if text_file(source) is None else Path(source).name


def absolute_text(source: str | Path) -> str:
    """Return the source, with an absolute path if it is a file."""
    return str(source if text_file(source) is None else Path(source).expanduser().absolute())


def kind_of(path: Path) -> str:
    """Return the suffix that tells a file's format, in lower case and without `.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_file(path: Path, reader: Any) -> Iterator[Any]:
    """Yield what a reader makes of a file, gzipped or not. Raises `RequestError`."""
    open_it: Any = gzip.open if path.suffix.lower() == ".gz" else open
    mode, encoding = ("rb", None) if reader is parquet_rows else ("rt", "utf-8-sig")
    number = 0
    try:
        with open_it(path, mode, encoding=encoding) as file:
            for item in reader(file):
                yield item
                number += 1
    except READ_ERRORS as error:
        place = "" if reader is text_blocks else f"row {number + 1} of "
        reason = str(getattr(error, "reason", error)).partition("\n")[0].rstrip(".")
        hint = "".join(hint for kind, hint in HINTS.items() if isinstance(error, kind))
        raise RequestError(f"cannot read {place}{path.name}: {reason}.{hint}") from error


def text_blocks(file: Any) -> Iterator[str]:
    """Yield plain text. Raises `ValueError` for JSON, whose braces would be read as prose."""
    head = file.read(BLOCK)
    if begins_with_rows(head):
        raise ValueError("it holds rows of JSON, which are read if its name ends in .jsonl")
    for block in chain([head], iter(partial(file.read, BLOCK), "")):
        if "\0" in block:
            raise UnicodeError("it holds a NUL byte")
        yield block


def begins_with_rows(head: str) -> bool:
    """Tell whether a text is a JSON object, followed by nothing or another, or a list of them."""
    start = len(head) - len(head.lstrip("[ \t\n"))
    try:
        row, end = json.JSONDecoder().raw_decode(head, start)
    except (ValueError, RecursionError):
        return False
    behind = head[end:].lstrip()[:1]
    return isinstance(row, dict) and behind in (",]" if "[" in head[:start] else "{")


# The loaders of `datasets` cast every row to the types of the first ones, so that a stray number
# fails and a date becomes another text; their errors name no row, and they need a cache.
def json_rows(file: Any) -> Iterator[Row]:
    """Yield JSON objects: one a line, or the members of one list, which is read whole."""
    is_list = file.read(BLOCK).lstrip().startswith("[")
    file.seek(0)
    lines = (json.loads(line) for line in file if line.strip())
    for row in json.load(file) if is_list else lines:
        if not isinstance(row, dict):
            raise ValueError(f'it is {json.dumps(row)[:40]}, not an object such as {{"text": ...}}')
        yield row


def csv_rows(file: Any) -> Iterator[Row]:
    """Yield the rows below the header; an empty cell is None."""
    csv.field_size_limit(2**31 - 1)  # a document may be long
    delimiter = max(",;\t", key=file.readline().count)
    file.seek(0)
    for row in csv.DictReader(file, delimiter=delimiter, strict=True):
        if None in row:
            raise ValueError("it has more cells than the header")
        yield {column: cell or None for column, cell in row.items()}


def parquet_rows(file: Any) -> Iterator[Row]:
    """Yield the rows of all batches."""
    for batch in ParquetFile(file).iter_batches(batch_size=256):
        yield from batch.to_pylist()


TABLES = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), json_rows),
    **dict.fromkeys((".csv", ".tsv"), csv_rows),
    ".parquet": parquet_rows,
}
"""Readers by suffix."""


def hub_documents(name: str, part: str) -> Iterator[str]:
    """Yield the texts of a Hub data set. Raises `RequestError` if a file was meant."""
    path = Path(name).expanduser()
    if path.is_dir():
        raise RequestError(f"{name} is a folder, not a text: give one of its files.")
    known = DATASETS[name][part] if name in DATASETS else name
    dataset, subset, split, column = (*known.split(":"), "", "", "")[:4]
    looks_local = path.is_absolute() or name.startswith((".", "~"))
    if looks_local or kind_of(Path(dataset)) in (".txt", ".md", *TABLES):
        raise RequestError(f"there is no text file {name}.")
    rows = hub_rows(name, path=dataset, name=subset or None, split=split or part)
    return documents(rows, column or None, name, f"{dataset}:SUBSET:SPLIT:COLUMN")


def hub_rows(source: str, **arguments: Any) -> Iterator[Row]:
    """Yield the first rows of a Hub data set, streamed."""
    try:
        yield from islice(load_dataset(**arguments, streaming=True), MAX_DOCUMENTS)
    except Exception as error:  # load_dataset has no common base class for its errors
        unreachable = isinstance(error, (ConnectionError, TimeoutError))
        raise (CMoEError if unreachable else RequestError)(
            f"cannot read {source} as a data set: {error}. Give a local file (.txt, .jsonl, .csv, "
            ".parquet), wikitext2, c4, or dataset[:subset][:split][:column]."
        ) from error


def documents(rows: Iterator[Row], column: str | None, name: str, example: str) -> Iterator[str]:
    """Yield the texts of a table, with a blank line before all but the first.

    Rows without text are counted in one warning; that no row has any is a `RequestError`.
    """
    head = list(islice(rows, PEEKED_ROWS))
    if not head:
        return
    column = column_of(head, column, name, example)
    total = skipped = 0
    first = ""
    try:
        for total, row in enumerate(chain(head, rows), 1):
            value = row.get(column)
            if is_text(value):
                yield f"\n\n{value}" if total - skipped > 1 else value
            else:
                skipped += 1
                first = first or f"row {total} has {json.dumps(value, default=str)[:40]}"
    finally:  # also if enough was read
        if skipped and skipped < total:
            logger.warning(
                "%d of %d rows of %s have no text in their column %r and were skipped: %s.",
                *(skipped, total, name, column, first),
            )
    if skipped == total:
        raise RequestError(f"no row of {name} has text in its column {column!r}: {first}.")


def column_of(rows: Sequence[Row], column: str | None, name: str, example: str) -> str:
    """Return the column to read: as named, or `text`, or the only one that holds letters."""
    cells = [cell for row in rows for cell in row.items()]
    columns, wanted = list(dict.fromkeys(key for key, _ in cells)), column or "text"
    if wanted in columns:
        return wanted
    holding = {key for key, it in cells if is_text(it) and any(map(str.isalpha, it))}
    if column is None and len(holding) == 1:
        [wanted] = holding
        logger.warning(
            "%s has no column 'text': %r is read, the only one that holds text.", name, wanted
        )
        return wanted
    raise RequestError(f"{name} has no column {wanted!r}; it has {columns}. Name one: {example}.")


def is_text(value: Any) -> TypeGuard[str]:
    """Tell whether a value is a string that can be encoded: JSON can write half a character."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False
