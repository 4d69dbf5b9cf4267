# SPDX-License-Identifier: Apache-2.0
"""What another architecture must have, to compute what a carved model does."""

from collections.abc import Collection
from pathlib import Path

from transformers import PreTrainedConfig

from cmoe_hf.modeling_cmoe import PIN_LIMIT, attention_types

from ..source.architectures import Architecture
from ..source.stored import read_headers, read_tensors

NEEDS = {
    "shared": "shared expert",
    "pins": "pinned experts (--budget)",
    "balance": "trained balance_bias",
    "scale": "trained gate scale",
    "leading": "dense layers at the beginning",
    "trailing": "dense layers at the end",
    "between": "dense layers between carved ones",
    "biases": "biases of queries, keys and values",
    "output bias": "bias behind attention",
    "norms": "norms of queries and keys",
    "window": "layers that attend in a sliding window",
}
"""What a model may need, in words."""
UNDONE_BY = {"balance": "--bias-speed 0", "scale": "--router-learning-rate 0"}
"""With what option of `recover` a model does without."""


def needs_of(config: PreTrainedConfig, arch: Architecture, folder: Path) -> set[str]:
    """Names from `NEEDS`, from the configuration and the few tensors that decide."""
    needs = {*(arch.differs or ())}
    if getattr(config, "shared_expert_intermediate_size", 0):
        needs.add("shared")
    if "sliding_attention" in attention_types(config):
        needs.add("window")
    if getattr(config, "attention_bias", False):
        needs.add("biases")
    return needs | dense_needs(config) | trained_needs(folder)


def dense_needs(config: PreTrainedConfig) -> set[str]:
    """Where dense layers lie between carved ones."""
    dense = {*(getattr(config, "dense_layers", None) or [])}
    carved = [index for index in range(config.num_hidden_layers) if index not in dense]
    places = {
        "leading": any(index < carved[0] for index in dense),
        "trailing": any(index > carved[-1] for index in dense),
        "between": any(carved[0] < index < carved[-1] for index in dense),
    }
    return {place for place, there in places.items() if there}


def trained_needs(folder: Path) -> set[str]:
    """What the gates have learned, and a bias of attention's output that is not zero."""
    kinds = {"mlp.gate.scale": "scale", "mlp.gate.balance_bias": "balance"}
    kinds["self_attn.o_proj.bias"] = "output bias"
    needs = set()
    stored = read_headers(folder)
    asked = {name: it for name, it in stored.items() if name.endswith(tuple(kinds))}
    for name, tensor in read_tensors(asked):
        need = next(need for end, need in kinds.items() if name.endswith(end))
        if need == "balance" and (tensor > PIN_LIMIT).any():
            needs.add("pins")
            tensor = tensor[tensor <= PIN_LIMIT]
        if tensor.any():
            needs.add(need)
    return needs


def lacking(needs: Collection[str], represented: Collection[str]) -> list[str]:
    """What of the needs is not represented, in words."""
    found = [need for need in NEEDS if need in needs and need not in represented]
    hints = {need: f" (recover with {option})" for need, option in UNDONE_BY.items()}
    return [NEEDS[need] + hints.get(need, "") for need in found]
