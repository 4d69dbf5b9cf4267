# SPDX-License-Identifier: Apache-2.0
"""Models as their users load them, from a folder or the Hub."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import CMoEError, RequestError
from .hub import fetch_model, find_model, load_tokenizer
from .library import PLAIN_OUTPUTS
from .stored import weight_files

WINDOW = 2048
"""Tokens of a window where nobody says otherwise and the model's context is no shorter."""


def window_length(
    config: PreTrainedConfig,
    asked: int | None,
    *others: PreTrainedConfig,
    option: str = "--sequence-length",
    usual: int = WINDOW,
    new_tokens: int = 0,
) -> int:
    """Return the number of tokens in a sequence: as asked for, or by default what fits the context.

    `new_tokens` are generated behind it. Raises `RequestError` naming the `option` if all that is
    longer than the context of one of the models.
    """
    contexts = (getattr(it, "max_position_embeddings", sys.maxsize) for it in (config, *others))
    context = min(contexts)
    length = max(1, min(usual, context - new_tokens)) if asked is None else asked
    if length + new_tokens > context:
        behind = f" with {new_tokens} new tokens" if new_tokens else ""
        raise RequestError(
            f"{option} {length}{behind} is longer than the model's context of {context} tokens."
        )
    return length


def model_folder(model: str | Path, *, code: bool = False) -> tuple[Path, str]:
    """Return the folder of a model's files, downloaded if need be, and its name: never a path."""
    folder, name, commit = find_model(model)
    return (folder if commit is None else fetch_model(name, commit, code=code)), name


def load_config(model: str | Path, trust_remote_code: bool) -> PreTrainedConfig:
    """Return the configuration of a model. Raises `CMoEError` if it cannot be loaded."""
    folder, name = model_folder(model)
    with explained(name):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def load_model(
    model: str | Path, dtype: str | None, device: torch.device, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal language model in evaluation mode, and its tokenizer."""
    folder, name = model_folder(model)
    weight_files(folder)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    with explained(name):
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", trust_remote_code=trust_remote_code, **PLAIN_OUTPUTS
        )
    loaded.to(device)  # type: ignore[arg-type] # the library declares it for strings only
    return loaded.eval(), tokenizer


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn whatever the library's readers raise into a `CMoEError` that names the model."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CMoEError(f"{name} cannot be loaded: {reason}") from error
