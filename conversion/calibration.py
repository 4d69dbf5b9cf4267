# SPDX-License-Identifier: Apache-2.0
"""From a text source to windows of tokens.

Shape suffixes: W windows, L tokens of one window.
"""

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import PreTrainedTokenizerBase

from .errors import CMoEError, RequestError

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

TABLE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
MAX_DOCUMENTS = 100_000
"""Documents read from a Hub data set; they are streamed, so that C4 is not downloaded whole."""


def load_text(source: str | Path, *, part: str = "train") -> str:
    """The text of a source; documents are joined by a blank line.

    `source` is a file (`.jsonl`, `.json` and `.parquet` by their `text` column, anything else as
    plain UTF-8), `wikitext2`, `c4`, or `dataset[:subset][:split][:column]` of the Hub. `part` is
    `"train"` or `"test"` and matters for the short names only.

    Raises `RequestError` for a source that does not exist or has no text, `CMoEError` for one
    that cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix in TABLE_FORMATS:
            arguments: dict[str, Any] = {
                "path": TABLE_FORMATS[path.suffix],
                "data_files": str(path),
                "split": "train",
            }
            return _join_documents(arguments, None, name=path.name)
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"{path.name} is not UTF-8 text ({error}).") from error
    name = str(source)
    if name in DATASETS:
        return _join_documents(DATASETS[name][part], "text", name=name)
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix in (".txt", *TABLE_FORMATS):
        raise RequestError(f"there is no text file {name}.")
    dataset, subset, split, column = (*name.split(":"), "", "", "", "")[:4]
    arguments = {"path": dataset, "name": subset or None, "split": split or part}
    return _join_documents(arguments, column or None, name=name)


def _join_documents(arguments: dict[str, Any], column: str | None, *, name: str) -> str:
    """Stream a data set and join its text column."""
    try:
        rows = list(islice(load_dataset(**arguments, streaming=True), MAX_DOCUMENTS))
    except (ConnectionError, TimeoutError) as error:
        raise CMoEError(
            f"cannot reach the data set {name}: {error}. Give a local text file instead."
        ) from error
    except Exception as error:  # load_dataset has no common base class for its errors
        raise RequestError(
            f"cannot read {name} as a data set: {error}. Give a local file (.txt, .jsonl, "
            ".parquet), wikitext2, c4, or dataset[:subset][:split][:column]."
        ) from error
    columns = list(rows[0]) if rows else []
    column = column or "text"
    if column not in columns:
        raise RequestError(f"{name} has no column {column!r}; it has {columns}.")
    return "\n\n".join(row[column] for row in rows)


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """The whole text as one row of token ids, int64."""
    # verbose=False: a text longer than the model's context is what we want here.
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    return ids[0].to(torch.int64)


def random_windows(
    ids: torch.Tensor, *, samples: int, length: int, seed: int, least: float = 1.0
) -> torch.Tensor:
    """`samples` windows of `length` tokens at random offsets, (W, L) int64.

    Raises `RequestError` if the text has fewer than `least` times `samples * length` tokens.
    """
    needed = max(int(least * samples * length), length + 1)
    if len(ids) < needed:
        raise RequestError(
            f"the text has {len(ids):,} tokens, but {samples} windows of {length} need "
            f"{needed:,}. Give more text, or lower --samples or --sequence-length."
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - length + 1, (samples,), generator=generator)
    return torch.stack([ids[start : start + length] for start in starts.tolist()])


def consecutive_windows(ids: torch.Tensor, *, length: int) -> torch.Tensor:
    """Consecutive windows of `length` tokens, (W, L); the last partial one is dropped.

    Raises `RequestError` if there is not one whole window.
    """
    count = len(ids) // length
    if count == 0:
        raise RequestError(
            f"the text has {len(ids):,} tokens, fewer than one window of {length}. Give more "
            "text or a lower --sequence-length."
        )
    return ids[: count * length].view(count, length)
