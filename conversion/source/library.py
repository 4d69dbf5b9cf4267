# SPDX-License-Identifier: Apache-2.0
"""The dense model as the library builds it from `config.json`, on the meta device.

Whatever the library cannot build is found here, before any work, and refused by its field.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import CMoEError, RequestError
from .architectures import is_moe
from .stored import read_json

SIZES = re.compile(r"num_\w+|\w+_size|head_dim|max_position_embeddings|sliding_window")
"""Fields that are above zero, if they are integers at all."""
PLAIN_OUTPUTS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
"""How models are run here, whatever their configuration makes them return; a carved model keeps
what its source says."""


def attention_types(config: PreTrainedConfig) -> list[str]:
    """Return how far each layer looks back: `full_attention` or `sliding_attention`."""
    types = getattr(config, "layer_types", None)
    if types is None:
        window = getattr(config, "sliding_window", None)
        types = ["full_attention" if window is None else "sliding_attention"]
        types *= config.num_hidden_layers
    return types


def dense_config(dense: type[PreTrainedConfig], folder: Path, name: str) -> PreTrainedConfig:
    """Return a folder's configuration. Raises `RequestError` if it is none of the family."""
    raw = read_json(folder / "config.json")
    fields = {field.name for field in dataclasses.fields(dense)}
    # A sliding window that is switched off may be anything, and what may be absent zero.
    absent = {field.name for field in dataclasses.fields(dense) if field.default == 0}
    checked = raw.keys() & fields - {"sliding_window"} - absent
    check_sizes({key: raw[key] for key in checked}, name)
    try:
        config = dense.from_pretrained(folder)
    except Exception as error:  # the library raises whatever its validators raise
        raise RequestError(f"config.json of {name} is not usable: {error}") from error
    check_sizes({key: getattr(config, key) for key in fields & {"sliding_window"}}, name)
    if not config.return_dict:
        raise RequestError(
            f"config.json of {name} is not usable: return_dict is false, and the library's models "
            "fail on the tuples that their decoders then return. Remove the field."
        )
    if is_moe(config) and config.num_experts_per_tok > config.num_experts:
        raise RequestError(
            f"config.json of {name} is not usable: num_experts_per_tok is "
            f"{config.num_experts_per_tok}, but there are only {config.num_experts} experts."
        )
    return config


def check_sizes(fields: Mapping[str, Any], name: str) -> None:
    """Raise `RequestError` for a size that is none. Other types are for the library to refuse."""
    for key, value in sorted(fields.items()):
        if SIZES.fullmatch(key) and isinstance(value, int) and value < 1:
            raise RequestError(
                f"config.json of {name} is not usable: {key} is {value}, and must be at least 1."
            )


def meta_model(model: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """Return a causal model on the meta device, to be run for its hidden states alone."""
    plain = type(config).from_dict(config.to_dict() | PLAIN_OUTPUTS)
    plain.use_cache = False
    with torch.device("meta"):
        return model(plain)


@contextmanager
def blaming(config: PreTrainedConfig, name: str, *fields: str) -> Iterator[None]:
    """Turn whatever the library raises into a `RequestError` that names the fields in question."""
    try:
        yield
    except CMoEError:
        raise
    except Exception as error:
        known = {key: getattr(config, key) for key in fields if hasattr(config, key)}
        named = ", ".join(f"{key} = {value!r}" for key, value in known.items())
        raise RequestError(
            f"config.json of {name} is not usable: the library cannot build a model with {named} "
            f"({type(error).__name__}: {error})."
        ) from error
