# SPDX-License-Identifier: Apache-2.0
"""The dense model as the library builds it from `config.json`, without weights.

Whatever the library cannot build is found here, before any work, and refused by its field.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .architectures import Architecture
from .decoder import AttentionHalf
from .errors import RequestError
from .stored import read_json

SIZES = re.compile(r"num_\w+|\w+_size|head_dim|max_position_embeddings|sliding_window")
"""Fields that are above zero, if they are integers at all."""


def dense_config(row: Architecture, folder: Path, name: str) -> PreTrainedConfig:
    """The configuration in a folder. Raises `RequestError` if it cannot be one of the family."""
    raw = read_json(folder / "config.json")
    fields = {field.name for field in dataclasses.fields(row.dense_config)}
    # A sliding window that is switched off may be anything.
    check_sizes({key: raw[key] for key in raw.keys() & fields - {"sliding_window"}}, name)
    try:
        config = row.dense_config.from_pretrained(folder)
    except Exception as error:  # the library raises whatever its validators raise
        raise RequestError(f"config.json of {name} is not usable: {error}") from error
    check_sizes({key: getattr(config, key) for key in fields & {"sliding_window"}}, name)
    if row.router is not None and config.num_experts_per_tok > config.num_experts:
        raise RequestError(
            f"config.json of {name} is not usable: num_experts_per_tok is "
            f"{config.num_experts_per_tok}, but there are only {config.num_experts} experts."
        )
    return config


def check_sizes(fields: Mapping[str, Any], name: str) -> None:
    """Raises `RequestError` for a size that is none. Other types are for the library to refuse."""
    for key, value in sorted(fields.items()):
        if SIZES.fullmatch(key) and isinstance(value, int) and value < 1:
            raise RequestError(
                f"config.json of {name} is not usable: {key} is {value}, and must be at least 1."
            )


def dense_shapes(row: Architecture, config: PreTrainedConfig, name: str) -> dict[str, list[int]]:
    """Names and shapes of the model's tensors.

    Raises `RequestError` naming the fields for a model that cannot be built, or whose attention
    cannot run.
    """
    with blaming(config, name, "hidden_act"):
        ACT2FN[config.hidden_act]
    with blaming(config, name, "rope_parameters", "rope_scaling"):
        row.rotary_embedding(config)
    heads = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    with blaming(config, name, *heads), torch.no_grad():
        half = AttentionHalf(row, config, 2, torch.device("cpu"))
        half.position_ids = half.position_ids.to("meta")
        half.position_embeddings = tuple(part.to("meta") for part in half.position_embeddings)
        half(torch.empty(1, 2, config.hidden_size, device="meta"))
    with blaming(config, name, "vocab_size", "pad_token_id"), torch.device("meta"):
        model = row.dense_model(config)
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


@contextmanager
def blaming(config: PreTrainedConfig, name: str, *fields: str) -> Iterator[None]:
    """Turn whatever the library raises into a `RequestError` that names the fields in question."""
    try:
        yield
    except Exception as error:
        known = {key: getattr(config, key) for key in fields if hasattr(config, key)}
        told = ", ".join(f"{key} = {value!r}" for key, value in known.items())
        raise RequestError(
            f"config.json of {name} is not usable: the library cannot build a model with {told} "
            f"({type(error).__name__}: {error})."
        ) from error
