# SPDX-License-Identifier: Apache-2.0
"""What another architecture must have to compute what a model does, and which one is chosen."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedConfig

from ..carve.router import always_on_mask
from ..errors import RequestError
from ..measure.routing import layer_number, stored_always_on
from ..source.architectures import differences
from ..source.library import attention_types
from ..source.stored import read_headers, read_tensors

NEEDS = {
    "shared": "shared expert",
    "pins": "always-on experts (--budget)",
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


def needs_of(config: PreTrainedConfig, folder: Path) -> set[str]:
    """Return names from `NEEDS`, from the configuration and the few tensors that decide."""
    carved = carved_layers(config)
    first, last = carved[0], carved[-1]
    found = {
        "shared": getattr(config, "shared_expert_intermediate_size", 0),
        "window": "sliding_attention" in attention_types(config),
        "biases": getattr(config, "attention_bias", False),
        "leading": first > 0,
        "trailing": last < config.num_hidden_layers - 1,
        "between": len(carved) <= last - first,
    }
    needs = {*(differences(config) or ()), *(need for need, there in found.items() if there)}
    return needs | trained_needs(config, folder)


def carved_layers(config: PreTrainedConfig) -> list[int]:
    """Return the layers whose FFN is carved; of a dense model all layers."""
    dense = getattr(config, "dense_layers", None) or []
    return [index for index in range(config.num_hidden_layers) if index not in dense]


def trained_needs(config: PreTrainedConfig, folder: Path) -> set[str]:
    """Return what the gates have learned, and a bias of attention's output that is not zero."""
    kinds = {
        "mlp.gate.scale": "scale",
        "mlp.gate.balance_bias": "balance",
        "self_attn.o_proj.bias": "output bias",
    }
    always_on = stored_always_on(folder, config)
    needs = {"pins"} if always_on else set()
    stored = read_headers(folder).items()
    for name, tensor in read_tensors({name: it for name, it in stored if name.endswith((*kinds,))}):
        need = next(need for end, need in kinds.items() if name.endswith(end))
        if need == "balance" and always_on:
            tensor = tensor[~always_on_mask(tensor, always_on[layer_number(name)])]
        if tensor.any():
            needs.add(need)
    return needs


def lacking(needs: Collection[str], represented: Collection[str]) -> list[str]:
    """Return what of the needs is not represented, in words."""
    found = [need for need in NEEDS if need in needs and need not in represented]
    hints = {need: f" (recover with {option})" for need, option in UNDONE_BY.items()}
    return [NEEDS[need] + hints.get(need, "") for need in found]


@dataclass(frozen=True, kw_only=True)
class Stock:
    """An architecture that others have written."""

    name: str
    represents: frozenset[str]
    """Names from `NEEDS`."""
    wants: frozenset[str] = frozenset()
    """What it insists on."""
    interleaved: bool = False
    """Whether rotary embeddings turn neighbouring rows of queries and keys."""

    def refusals(self, config: Any, needs: set[str]) -> list[str]:
        """Return why it cannot be this model."""
        return [
            *(f"has no {what}" for what in lacking(needs, self.represents)),
            *(f"always has {what}" for what in lacking(self.wants, needs)),
        ]

    def interleaved_heads(self, name: str, config: Any) -> int:
        """Return the heads of a projection of which the halves are interleaved, by its name."""
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        return sum(heads[it] for it in heads if self.interleaved and f"self_attn.{it}." in name)


AnyStock = TypeVar("AnyStock", bound=Stock)


def head_width(config: Any) -> int:
    """Return the width of a head of attention."""
    width = getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)


def choose(
    stocks: Sequence[AnyStock], config: Any, needs: set[str], name: str, to: str | None
) -> tuple[AnyStock, list[str]]:
    """Choose the first architecture that nothing speaks against, and say why it is no other.

    Args:
        stocks: The best first.
        config, needs, name: Of the model.
        to: Choose the architecture of this name.

    Raises:
        RequestError: There is none, or it is not the one asked for.
    """
    refusals = {it.name: it.refusals(config, needs) for it in stocks}
    said = {it: f"{it} {' and '.join(reasons)}" for it, reasons in refusals.items() if reasons}
    fitting = [it for it in stocks if it.name not in said]
    if to in said:
        others = ", ".join(it.name for it in fitting) or "nothing"
        raise RequestError(f"{name} cannot be exported: {said[to]}. {others} represents it.")
    if to is not None:
        return next(it for it in fitting if it.name == to), ["asked for"]
    if not fitting:
        raise RequestError(f"{name} cannot be exported: {'; '.join(said.values())}.")
    return fitting[0], [*said.values()][: stocks.index(fitting[0])]
