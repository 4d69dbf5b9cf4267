# SPDX-License-Identifier: Apache-2.0
"""The dense model as the library builds it from `config.json`: all of it, or one layer.

Whatever the library cannot build is found here, before any work, and refused by its field.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from ..errors import RequestError
from .architectures import Architecture
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


def dense_config(arch: Architecture, folder: Path, name: str) -> PreTrainedConfig:
    """Return a folder's configuration. Raises `RequestError` if it is none of the family."""
    raw = read_json(folder / "config.json")
    fields = {field.name for field in dataclasses.fields(arch.dense_config)}
    # A sliding window that is switched off may be anything.
    check_sizes({key: raw[key] for key in raw.keys() & fields - {"sliding_window"}}, name)
    try:
        config = arch.dense_config.from_pretrained(folder)
    except Exception as error:  # the library raises whatever its validators raise
        raise RequestError(f"config.json of {name} is not usable: {error}") from error
    check_sizes({key: getattr(config, key) for key in fields & {"sliding_window"}}, name)
    if not config.return_dict:
        raise RequestError(
            f"config.json of {name} is not usable: return_dict is false, and the library's models "
            "fail on the tuples that their decoders then return. Remove the field."
        )
    if arch.router is not None and config.num_experts_per_tok > config.num_experts:
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


def dense_shapes(arch: Architecture, config: PreTrainedConfig, name: str) -> dict[str, list[int]]:
    """Return names and shapes of the model's tensors.

    Raises `RequestError` naming the fields for a model that cannot be built, or whose attention
    cannot run.
    """
    with blaming(config, name, "hidden_act"):
        ACT2FN[config.hidden_act]
    with blaming(config, name, "rope_parameters", "rope_scaling"):
        arch.rotary_embedding(config)
    heads = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    with blaming(config, name, *heads), torch.no_grad():
        half = AttentionHalf(arch, config, 2, torch.device("cpu"))
        half.position_ids = half.position_ids.to("meta")
        half.position_embeddings = tuple(part.to("meta") for part in half.position_embeddings)
        half(torch.empty(1, 2, config.hidden_size, device="meta"))
    with blaming(config, name, "vocab_size", "pad_token_id"), torch.device("meta"):
        model = arch.dense_model(config)
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


@contextmanager
def blaming(config: PreTrainedConfig, name: str, *fields: str) -> Iterator[None]:
    """Turn whatever the library raises into a `RequestError` that names the fields in question."""
    try:
        yield
    except Exception as error:
        known = {key: getattr(config, key) for key in fields if hasattr(config, key)}
        named = ", ".join(f"{key} = {value!r}" for key, value in known.items())
        raise RequestError(
            f"config.json of {name} is not usable: the library cannot build a model with {named} "
            f"({type(error).__name__}: {error})."
        ) from error


class AttentionHalf(nn.Module):
    """Return what the FFN is added to and what it sees, both (W, L, H) as the hidden states.

    Runs the library's own decoder layer with a recorder in the place of its FFN.
    """

    class Recorder(nn.Module):
        """Remember the input, and add nothing to the residual."""

        x: torch.Tensor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.x = x
            return torch.zeros_like(x)

    def __init__(self, arch: Architecture, config: Any, length: int, device: torch.device) -> None:
        super().__init__()
        config = type(config).from_dict(
            config.to_dict() | PLAIN_OUTPUTS, attn_implementation="sdpa"
        )
        with torch.device("meta"):
            self.layer = arch.decoder_layer(config, 0)
        self.ffn_input = self.layer.mlp = self.Recorder()
        self.layer.eval()
        self.position_ids = torch.arange(length, device=device).unsqueeze(0)
        window = getattr(config, "sliding_window", None)
        self.windows = [
            window if kind == "sliding_attention" else None for kind in attention_types(config)
        ]
        self.mask: torch.Tensor | None = None
        rotary = arch.rotary_embedding(config).to(device)
        self.position_embeddings = rotary(torch.empty(0, device=device), self.position_ids)

    def load(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Take the attention and norm weights of a layer, and look back as far as it does."""
        self.layer.load_state_dict(tensors, assign=True)
        window, position_L = self.windows[index], self.position_ids[0]
        # Without a mask sdpa is causal, and as fast as it can be.
        self.mask = None
        if window is not None and window < len(position_L):
            distance_LL = position_L[:, None] - position_L
            self.mask = ((distance_LL >= 0) & (distance_LL < window))[None, None]

    def release(self) -> None:
        """Let go of the weights."""
        self.layer.to("meta")

    def forward(self, hidden_WLH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        residual_WLH = self.layer(
            hidden_WLH,
            attention_mask=self.mask,
            position_ids=self.position_ids,
            position_embeddings=self.position_embeddings,
        )
        return residual_WLH, self.ffn_input.x
