# SPDX-License-Identifier: Apache-2.0
"""The architectures of llama.cpp that compute what our models and their dense sources do.

llama.cpp weighs experts by scores that sum to 1 over the A chosen ones. Where a file can say how,
it takes the softmax over the chosen experts alone: of scores scaled to nearly nothing that is 1/A
exactly, and the file multiplies by A.

Read in llama.cpp's source, October 2026 (86a2835): `src/models/{granite,glm4-moe,step35}.cpp` and
`build_moe_ffn` of `src/llama-graph.cpp`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..source.library import attention_types
from ..source.stored import TensorRef
from .needs import Stock, head_width
from .pieces import Made

SOFTMAX_OF_CHOSEN = 3
"""llama.cpp's number for choosing by scores and weighing by their softmax."""
TINY = 2.0**-30
"""Scale of the router where several experts run: every exponential is 1."""
BLOCK = 32
"""Neurons of a shared expert of zeros: what every type of numbers comes in multiples of."""
Fields = dict[str, Any]


def step_fields(config: Any) -> Fields:
    """Return the fields of `step35`, which without a window rotates half of what a file says."""
    types, width = attention_types(config), head_width(config)
    window, count = getattr(config, "sliding_window", None), config.num_hidden_layers
    fields = {
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size or BLOCK,
        "attention.sliding_window": window or 1,
        "attention.sliding_window_pattern": [it == "sliding_attention" for it in types],
        "rope.dimension_count": 2 * width,
        "rope.dimension_count_swa": width,
        "rope.freq_base_swa": float(config.rope_parameters["rope_theta"]),
    }
    if not window:  # llama.cpp stops without a layer that has one: see `empty_layer`
        fields |= {
            "block_count": count + 1,
            "attention.head_count": [config.num_attention_heads] * count + [1],
            "attention.head_count_kv": [config.num_key_value_heads] * count + [1],
            "attention.sliding_window_pattern": [False] * count + [True],
        }
    return fields


def empty_layer(config: Any, like: Made) -> dict[str, Made]:
    """Return the tensors of a layer of one head and no FFN that adds nothing."""
    hidden, width = config.hidden_size, head_width(config)
    shapes = dict.fromkeys(("attn_q", "attn_k", "attn_v"), (width, hidden))
    shapes["attn_output"] = (hidden, width)
    norms = [("attn_norm", hidden), ("ffn_norm", hidden)]
    norms += [(name, width) for name in ("attn_q_norm", "attn_k_norm")]
    made = {f"{name}.weight": Made(shape, like.dtype) for name, shape in shapes.items()}
    return made | {f"{name}.weight": Made((count,), like.dtype) for name, count in norms}


@dataclass(frozen=True, kw_only=True)
class Layout(Stock):
    """An architecture of llama.cpp."""

    ropes: tuple[str, ...] = ("default", "linear", "llama3")
    fields: Callable[[Any], Fields] = lambda config: {}
    """Beside those of every model, without the name in front."""
    routes: bool = True
    says_how: bool = True
    """Whether the file says how experts are chosen."""
    own_head: bool = False
    """It does not know heads that are tied to the embedding."""
    wants_window: bool = False
    """It does not know models of which no layer has a window."""

    def refusals(self, config: Any, needs: set[str]) -> list[str]:
        """Return why it cannot be this model."""
        if self.routes != hasattr(config, "moe_intermediate_size"):
            return ["is of dense models" if not self.routes else "is of models that route"]
        reasons, rope = super().refusals(config, needs), rope_type(config)
        if rope not in self.ropes:
            reasons.append(f"has no rotary embeddings of type {rope}")
        if self.routes and not self.says_how and config.num_experts_per_tok > 1:
            reasons.append("weighs several experts unevenly")
        if "window" in needs and rope != "default":
            reasons.append(f"has no rotary embeddings of type {rope} within a window")
        return reasons

    def routed(self, parts: Mapping[str, TensorRef], config: Any) -> dict[str, Made]:
        """Return the router and the experts of a layer."""
        router, gate_up = parts["mlp.gate.linear_weight"], parts["mlp.experts.gate_up_proj"]
        factor = TINY if config.num_experts_per_tok > 1 else 1.0
        made = {
            "ffn_gate_inp.weight": Made.of(router, dtype="F32", factor=factor, precise=True),
            "ffn_gate_exps.weight": Made.of_experts(gate_up, 0, 2),
            "ffn_up_exps.weight": Made.of_experts(gate_up, 1, 2),
            "ffn_down_exps.weight": Made.of_experts(parts["mlp.experts.down_proj"]),
        }
        if self.says_how:
            made["exp_probs_b.bias"] = Made.of(parts["mlp.gate.balance_bias"])
        if not config.shared_expert_intermediate_size and self.says_how:
            hidden = config.hidden_size
            made["ffn_gate_shexp.weight"] = Made.zeros(gate_up, BLOCK, hidden)
            made["ffn_up_shexp.weight"] = Made.zeros(gate_up, BLOCK, hidden)
            made["ffn_down_shexp.weight"] = Made.zeros(gate_up, hidden, BLOCK)
        return made


ALL = (  # those that more versions of llama.cpp know come first
    Layout(
        name="llama",
        represents=frozenset({"biases", "output bias"}),
        routes=False,
        interleaved=True,
    ),
    Layout(
        name="qwen2",
        represents=frozenset({"biases"}),
        wants=frozenset({"biases"}),
        ropes=("default", "linear"),
        routes=False,
    ),
    Layout(
        name="qwen3",
        represents=frozenset({"norms"}),
        wants=frozenset({"norms"}),
        ropes=("default", "linear"),
        routes=False,
    ),
    Layout(
        name="granitemoe",
        represents=frozenset({"shared", "biases"}),
        fields=lambda config: {
            "logit_scale": 1.0,
            "attention.scale": head_width(config) ** -0.5,
            "feed_forward_length": config.moe_intermediate_size,
            "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
        },
        says_how=False,
        interleaved=True,
    ),
    Layout(
        name="glm4moe",
        represents=frozenset({"shared", "pins", "leading", "biases", "norms"}),
        wants=frozenset({"shared"}),
        ropes=("default", "linear"),
        fields=lambda config: {
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_count": config.num_shared,
            "leading_dense_block_count": len(config.dense_layers or []),
        },
    ),
    Layout(
        name="step35",
        represents=frozenset(
            {"shared", "pins", "leading", "trailing", "between", "norms", "window"}
        ),
        fields=step_fields,
        own_head=True,
        wants_window=True,
    ),
)
LAYOUTS = {layout.name: layout for layout in ALL}


def rope_type(config: PreTrainedConfig) -> str:
    """Return the kind of rotary embeddings, as transformers calls it."""
    rope = getattr(config, "rope_parameters", None) or {}
    if float(rope.get("partial_rotary_factor", 1.0)) != 1:
        return "partial"
    return str(rope.get("rope_type", "default"))


def file_fields(layout: Layout, config: Any) -> Fields:
    """Return the fields of a model, with the name of the architecture in front."""
    rope, width = config.rope_parameters, head_width(config)
    fields = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": width,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope_type(config) == "linear":
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if hasattr(config, "moe_intermediate_size"):
        fields |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
        }
        if layout.says_how:
            fields |= {
                "expert_gating_func": SOFTMAX_OF_CHOSEN,
                "expert_weights_norm": False,
                "expert_weights_scale": float(config.num_experts_per_tok),
            }
    fields |= layout.fields(config)
    return {f"{layout.name}.{key}": value for key, value in fields.items()}


def rope_factors(config: Any) -> torch.Tensor | None:
    """Return the factors of the rotary embeddings' periods, (D/2) float32, if there are any."""
    if rope_type(config) != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = head_width(config)
    exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    return 1.0 / config.rope_parameters["rope_theta"] ** exponents / scaled
