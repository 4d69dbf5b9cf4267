# SPDX-License-Identifier: Apache-2.0
"""What a repository says of itself in `conversion.json`, so that others can see that it holds.

Likeliest tokens, log-probabilities and greedy tokens, computed by `model_outputs` when it is made.
"""

import math
import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from ..device import versions
from ..errors import CMoEError, RequestError
from ..source.stored import read_json
from . import outputs
from .outputs import TOLERANCE
from .unfinished import PartialFolder

CONVERSION = "conversion.json"
PROMPTS = (
    "A model that is carved goes on with a sentence as it did on the day it was made, and so",
    "Left of this one there is padding:",
)
LENGTHS = (8, 48)
"""Tokens of a prompt at least, in a model with a tiny context, and at most."""
COMPUTED = ("likeliest", "log_probabilities", "generated")
"""What of `model_outputs` a fingerprint holds."""


def fingerprint_of(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the fingerprint of a repository that was written just now.

    Raises `CMoEError` if it generates something else with a cache or a batch than without.
    """
    prompts = prompts_for(folder, tokenizer)
    found = computed(folder, folder.name, prompts, None)
    if wrong := inconsistencies(found):
        raise CMoEError(
            f"the model that was written is not usable under transformers "
            f"{versions()['transformers']}: {'; '.join(wrong)}. If the source is sound, install a "
            "version that cmoe-hf has been tested with, and go on."
        )
    return {"prompts": prompts, **{name: found[name] for name in COMPUTED}}


def write_fingerprint(
    source: Path, work: PartialFolder, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write the `conversion.json` of the source with a fingerprint of the new folder."""
    record = conversion_record(source)
    record["fingerprint"] = fingerprint_of(work.folder, tokenizer)
    work.write_json(CONVERSION, record)


def conversion_record(folder: Path) -> dict[str, Any]:
    """Return the content of the folder's `conversion.json`; empty if there is none."""
    return read_json(folder / CONVERSION) if (folder / CONVERSION).is_file() else {}


def stated_fingerprint(folder: Path) -> dict[str, Any] | None:
    """Return the recorded fingerprint, None in an older repository. Raises `RequestError`."""
    stated: dict[str, Any] | None = conversion_record(folder).get("fingerprint")
    if stated is not None and not {"prompts", *COMPUTED} <= stated.keys():
        raise RequestError(f"the fingerprint in {CONVERSION} of {folder.name} is damaged.")
    return stated


def prompts_for(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return token ids of two prompts of different lengths, within the model's context."""
    context = getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", sys.maxsize)
    longest = max(LENGTHS[0], min(LENGTHS[1], context - outputs.GENERATED))
    ids = [tokenizer(prompt)["input_ids"][:longest] for prompt in PROMPTS]
    ids[1] = ids[1][: len(ids[0]) - 1]
    return ids


def computed(
    folder: Path, name: str, prompts: list[list[int]], recorded: list[int] | None
) -> dict[str, Any]:
    """Return `model_outputs` of this process. Raises `CMoEError` for what cannot be loaded."""
    try:
        return outputs.model_outputs(folder, prompts, recorded=recorded)
    except Exception as error:  # the library raises whatever its readers raise
        raise unloadable(name, str(error)) from error


def unloadable(name: str, reason: str) -> CMoEError:
    """Return the error for a model that cannot be run, with the last line of the reason."""
    lines = [line for line in reason.strip().splitlines() if line.strip()] or ["no reason given"]
    return CMoEError(
        f"{name} cannot be run under transformers {versions()['transformers']}: {lines[-1]}"
    )


def inconsistencies(found: dict[str, Any]) -> list[str]:
    """Return in words which ways to generate differ from the plain forward pass."""
    differences = found["differences"]
    if not math.isfinite(differences["cached"]):
        return ["its logits are not finite numbers"]
    words = {
        "cached": "it generates something else with the cache than without",
        "padded": "a batch padded on the left gives something else than its sequences alone",
    }
    return [  # `not <=`: a NaN is no agreement either
        f"{text} (log-probabilities differ by {differences[name]:.2g})"
        for name, text in words.items()
        if not differences[name] <= TOLERANCE
    ]


def moved(found: dict[str, Any], stated: dict[str, Any]) -> list[str]:
    """Return in words whether the likeliest tokens are not as likely as the fingerprint says."""
    pairs = zip(found["log_probabilities"], stated["log_probabilities"], strict=True)
    by = [max(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in pairs]
    if sorted(by)[len(by) // 2] <= TOLERANCE:
        return []
    return [f"its likeliest tokens have other log-probabilities (by {max(by):.2g})"]


def changes(found: dict[str, Any], stated: dict[str, Any]) -> list[str]:
    """Return in words what is not as the fingerprint says."""
    by = found["differences"]["recorded"]
    text = f"it no longer generates what it did (log-probabilities miss by {by:.2g})"
    return moved(found, stated) + ([] if by <= TOLERANCE else [text])
