# SPDX-License-Identifier: Apache-2.0
"""Models as their users load them, from a folder or the Hub."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import CMoEError
from .checkpoint import fetch_model, find_model, load_tokenizer
from .library import PLAIN_OUTPUTS
from .stored import weight_files

WINDOW = 2048
"""Tokens of a window where nobody says otherwise and the model's context is no shorter."""


def window_length(config: PreTrainedConfig, asked: int | None) -> int:
    """Tokens of a window: as asked for, or the usual number within the model's context."""
    return min(WINDOW, config.max_position_embeddings) if asked is None else asked


def model_folder(model: str | Path, *, code: bool = False) -> tuple[Path, str]:
    """Where the files of a model are, downloaded if need be, and its name: never a path."""
    folder, name, commit = find_model(model)
    return (folder if commit is None else fetch_model(name, commit, code=code)), name


def load_model(
    model: str | Path, dtype: str | None, device: torch.device, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, and its tokenizer."""
    folder, name = model_folder(model)
    weight_files(folder)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", trust_remote_code=trust_remote_code, **PLAIN_OUTPUTS
        )
    except Exception as error:  # the library raises whatever its readers raise
        reason = str(error).strip().splitlines()[0]
        raise CMoEError(f"{name} cannot be loaded: {reason}") from error
    loaded.to(device)  # type: ignore[arg-type] # the library declares it for strings only
    return loaded.eval(), tokenizer
