# SPDX-License-Identifier: Apache-2.0
"""From a text to windows of tokens.

Shape suffixes: W windows, L tokens of one window.
"""

import hashlib
import io
import logging
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import RequestError
from .texts import Text

WHOLE_CHARACTERS = 12_000_000
"""A text of fewer is tokenised as one string, at some 200 bytes of memory for each. All of
WikiText-2 has fewer, and so have most files."""
PIECE_CHARACTERS = 1_000_000
"""A longer one is tokenised in pieces of so many."""
HELD_OUT_TOKENS = 4096
"""Enough to compare choices, and few enough to keep what a layer makes of them."""
CHARACTERS_PER_TOKEN = 8
"""More than there are on average, so that a prefix of a text has enough tokens."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokens:
    """What was read of a text, as a model sees it."""

    ids: torch.Tensor
    """Of shape (T,), int64."""
    characters: int
    """How many they are made of."""
    is_whole: bool
    """Whether the text ends there."""
    sha256: str
    """Of the characters."""


def read_tokens(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    *,
    most_characters: int = sys.maxsize,
    least_tokens: int | None = None,
) -> Tokens:
    """Tokenise a text: as one string, or in pieces if it has `WHOLE_CHARACTERS` or more.

    Reads at most `most_characters`; with `least_tokens`, in pieces until there are so many.
    Raises `RequestError` if the text cannot be read, or a model of `vocabulary` tokens does not
    know one of these.
    """
    whole = WHOLE_CHARACTERS if least_tokens is None else PIECE_CHARACTERS
    pieces: list[torch.Tensor] = []
    characters, sha256 = 0, hashlib.sha256()
    with closing(text.chunks):
        for piece in cut(text.chunks, whole, most_characters):
            pieces.append(tokenize(tokenizer, piece, begins=not pieces))
            characters += len(piece)
            sha256.update(piece.encode())
            if least_tokens is not None and sum(map(len, pieces)) >= least_tokens:
                break
    ids = torch.cat(pieces)
    check_vocabulary(ids, vocabulary)
    is_whole = characters < most_characters
    if not is_whole:
        logger.warning("only the first %s characters of %s are read.", f"{characters:,}", text.name)
    elif least_tokens is None and len(pieces) > 1:
        logger.warning(
            "%s has %s characters or more: it is tokenised in pieces, cut at line ends.",
            *(text.name, f"{WHOLE_CHARACTERS:,}"),
        )
    return Tokens(ids, characters, is_whole, sha256.hexdigest())


def cut(chunks: Iterator[str], whole: int, most: int = sys.maxsize) -> Iterator[str]:
    """Yield the first `most` characters of a text: as one string if they are fewer than `whole`,
    else in pieces of at most `PIECE_CHARACTERS`, cut behind a line end if any, or before a space.
    """
    limit, buffer = whole, io.StringIO()
    for chunk in chunks:
        most -= buffer.write(chunk[:most])
        if buffer.tell() >= limit:
            text, start = buffer.getvalue(), 0
            while (stop := start + PIECE_CHARACTERS) < len(text):
                end = text.rfind("\n", start, stop) + 1
                end = end or max(text.rfind(" ", start + 1, stop), 0) or stop
                yield text[start:end]
                start = end
            limit, buffer = PIECE_CHARACTERS, io.StringIO()
            buffer.write(text[start:])
        if most == 0:
            break
    if rest := buffer.getvalue():
        yield rest


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, *, begins: bool = True) -> torch.Tensor:
    """Return the token ids of a string, (T,) int64; with special tokens where a text begins."""
    # verbose=False: a text longer than the model's context is what we want here.
    ids = tokenizer(text, return_tensors="pt", verbose=False, add_special_tokens=begins)
    return ids["input_ids"][0].to(torch.int64)


def check_vocabulary(ids: torch.Tensor, vocabulary: int) -> None:
    """Raise `RequestError` if a model of so many tokens does not know one of these."""
    if len(ids) and ids.max() >= vocabulary:
        raise RequestError(
            f"the tokenizer gives token {int(ids.max())}, but the model's vocabulary has "
            f"{vocabulary}: it is the tokenizer of another model."
        )


def held_out(windows: int, length: int) -> int:
    """Return how many of the last calibration tokens choose, and are not learnt first: an eighth,
    at most `HELD_OUT_TOKENS`, in whole windows if there are several."""
    if windows > 1:
        return max(1, min(windows // 8, HELD_OUT_TOKENS // length)) * length
    return min(max(1, length // 8), length - 1)


def apart_windows(ids: torch.Tensor, *, samples: int, length: int, seed: int) -> torch.Tensor:
    """Return random windows, those that are held out from the last eighth of the text and the
    others from before it, if it is long enough for both."""
    windows_WL = random_windows(ids, samples=samples, length=length, seed=seed)
    held, cut = held_out(samples, length) // length, len(ids) * 7 // 8
    if samples < 2 or len(ids) - cut <= length:
        return windows_WL
    draw = partial(random_windows, length=length, seed=seed, least=0)
    return torch.cat([draw(ids[:cut], samples=samples - held), draw(ids[cut:], samples=held)])


def random_windows(
    ids: torch.Tensor, *, samples: int, length: int, seed: int, least: float = 1.0
) -> torch.Tensor:
    """Return `samples` windows of `length` tokens at random offsets, (W, L) int64.

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
    """Return consecutive windows of `length` tokens, (W, L). Raise `RequestError` for none."""
    count = len(ids) // length
    if count == 0:
        raise RequestError(
            f"the text has {len(ids):,} tokens, fewer than one window of {length}. Give more "
            "text or a lower --sequence-length."
        )
    return ids[: count * length].view(count, length)
