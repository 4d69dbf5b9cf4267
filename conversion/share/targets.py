# SPDX-License-Identifier: Apache-2.0
"""The stock architectures that a carved model can become: one class each.

Our routing weights are 1; theirs are made of the scores and sum to 1 over the A chosen experts.
With several, the router is scaled by a power of two so small that the weights are even, which keeps
the order of the scores, and the experts' outputs are multiplied by A. Where an architecture scores
in 16 bits, other experts are chosen where two scores are close. Pinned experts need a bias that
only the selection sees; ours is above all probabilities and all sigmoids.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.ernie4_5_moe.configuration_ernie4_5_moe import Ernie4_5_MoeConfig
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.granitemoeshared.configuration_granitemoeshared import (
    GraniteMoeSharedConfig,
)
from transformers.models.granitemoeshared.modeling_granitemoeshared import (
    GraniteMoeSharedTopKRouter,
)
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from cmoe_hf import CMoEConfig
from cmoe_hf.modeling_cmoe import attention_types

from ..source.stored import TensorRef
from .needs import carved_layers, lacking
from .pieces import Made

SAME_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"),
    *("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters"),
    *("attention_dropout", "num_experts_per_tok", "bos_token_id", "eos_token_id"),
    *("pad_token_id", "dtype"),
)
"""Of the configuration; they mean the same in all."""
QUERIES_KEYS_VALUES = ("q_proj", "k_proj", "v_proj")
Parts = Mapping[str, TensorRef]
"""Tensors of a layer, by the rest of their names."""


class Target:
    """A stock architecture. The defaults are what most of them have."""

    name: ClassVar[str]
    config_class: ClassVar[type[PreTrainedConfig]]
    causal: ClassVar[str]
    """Its class in transformers."""
    router_class: ClassVar[type[torch.nn.Module]]
    represents: ClassVar[frozenset[str]]
    """Names from `NEEDS`."""
    unread: ClassVar[frozenset[str]] = frozenset()
    """What of that vLLM ignores silently."""
    float32_router: ClassVar[bool]
    """Whether it scores experts in float32 in any model."""
    few, tiny = 1.0, 2.0**-13
    """Scales of the router for one active expert, and for several. A smaller one would round close
    scores of a float32 softmax to ties, a larger one would make the weights uneven."""
    least_experts: ClassVar[int] = 1
    gate: ClassVar[str] = "mlp.gate.weight"
    bias: ClassVar[str | None] = None
    shared: ClassVar[str] = "mlp.shared_experts."
    biased: ClassVar[tuple[str, ...]] = ()
    """Projections of attention that have biases, if any has."""
    always_biased: ClassVar[bool] = False
    interleaved: ClassVar[bool] = False
    """Whether rotary embeddings turn neighbouring rows."""
    ties: ClassVar[bool] = True
    """Whether every engine takes the embeddings for a head that is not there."""

    def refusals(self, config: CMoEConfig, needs: set[str]) -> list[str]:
        """Return why it cannot be this model."""
        reasons = [f"has no {what}" for what in lacking(needs, self.represents)]
        if config.num_experts < self.least_experts:
            reasons.append(f"has at least {self.least_experts} routed experts")
        half = config.dtype == torch.float16
        if half and config.num_experts_per_tok > 1 and not self.float32_router:
            reasons.append("float16 is too coarse for the scores: convert with --dtype bfloat16")
        return reasons

    def fields(self, config: CMoEConfig, needs: set[str]) -> dict[str, Any]:
        """Return the fields of its configuration beside `SAME_FIELDS`."""
        return {
            "moe_intermediate_size": config.moe_intermediate_size,
            "num_experts": config.num_experts,
            "norm_topk_prob": True,
            "mlp_only_layers": list(config.dense_layers or []),
        }

    def config(self, config: CMoEConfig, needs: set[str]) -> PreTrainedConfig:
        """Return its configuration."""
        same = {name: getattr(config, name) for name in SAME_FIELDS if hasattr(config, name)}
        own = {"architectures": [self.causal], **self.fields(config, needs)}
        if not self.ties:
            own["tie_word_embeddings"] = False
        return self.config_class(**same | own)

    def ends(self, parts: Parts) -> dict[str, Made]:
        """Return the tensors outside the layers."""
        made = {part: Made.of(it) for part, it in parts.items()}
        if not self.ties and "lm_head.weight" not in made:
            made["lm_head.weight"] = Made.of(parts["model.embed_tokens.weight"])
        return made

    def layer(self, parts: Parts, config: CMoEConfig) -> dict[str, Made]:
        """Return the tensors of a layer, by their names on the Hub."""
        made = {
            part: Made.of(it) for part, it in parts.items() if not part.startswith("mlp.")
        } | self.attention(parts, config)
        if "self_attn.o_proj.bias" in made and "o_proj" not in self.biased:
            del made["self_attn.o_proj.bias"]  # it is zero: else the model is refused
        if "mlp.experts.down_proj" not in parts:
            return made | {part: Made.of(it) for part, it in parts.items() if part not in made}
        return (
            made
            | self.routing(parts, config)
            | self.shared_expert(parts, config)
            | self.experts(parts, config)
        )

    def attention(self, parts: Parts, config: CMoEConfig) -> dict[str, Made]:
        """Return biases that have to be there, and queries and keys in another order."""
        made = {}
        biased = self.always_biased or "self_attn.q_proj.bias" in parts
        for name in self.biased if biased else ():
            if (bias := f"self_attn.{name}.bias") not in parts:
                weight = parts[f"self_attn.{name}.weight"]
                made[bias] = Made.zeros(weight, weight.shape[0])
        if self.interleaved:
            heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
            for letter, count in heads.items():
                name = f"self_attn.{letter}_proj.weight"
                made[name] = Made.of(parts[name], interleaved=count)
        return made

    def routing(self, parts: Parts, config: CMoEConfig) -> dict[str, Made]:
        """Return the router, and the bias that pins experts."""
        scale = self.few if config.num_experts_per_tok == 1 else self.tiny
        router = Made.of(parts["mlp.gate.linear_weight"], factor=scale)
        made = {self.gate: replace(router, dtype="F32") if self.float32_router else router}
        if self.bias is not None:
            made[self.bias] = Made.of(parts["mlp.gate.balance_bias"])
        return made

    def shared_expert(self, parts: Parts, config: CMoEConfig) -> dict[str, Made]:
        """Return what always runs."""
        return {
            self.shared + part.removeprefix("mlp.shared_expert."): Made.of(it)
            for part, it in parts.items()
            if part.startswith("mlp.shared_expert.")
        }

    def experts(self, parts: Parts, config: CMoEConfig) -> dict[str, Made]:
        """Return the routed experts, one by one."""
        gate_up, down = parts["mlp.experts.gate_up_proj"], parts["mlp.experts.down_proj"]
        factor, made = self.down_factor(config), {}
        for number in range(config.num_experts):
            expert = f"mlp.experts.{number}."
            made[f"{expert}gate_proj.weight"] = Made.of(gate_up.of_expert(number, 0, 2))
            made[f"{expert}up_proj.weight"] = Made.of(gate_up.of_expert(number, 1, 2))
            made[f"{expert}down_proj.weight"] = Made.of(down.of_expert(number, 0, 1), factor=factor)
        return made

    def down_factor(self, config: CMoEConfig) -> float:
        """Return the factor of the routed down projections."""
        return config.num_experts_per_tok


def zero_expert(name: str, like: TensorRef, width: int, hidden: int) -> dict[str, Made]:
    """Return a shared expert of zeros, for architectures that insist on one."""
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    return {f"{name}{part}_proj.weight": Made.zeros(like, *it) for part, it in shapes.items()}


class Granite(Target):
    """GraniteMoeShared chooses by the scores themselves; no gate on the shared expert."""

    name = "granite"
    config_class, causal = GraniteMoeSharedConfig, "GraniteMoeSharedForCausalLM"
    router_class = GraniteMoeSharedTopKRouter
    represents = frozenset({"shared", "biases", "output bias"})
    unread = frozenset({"biases", "output bias"})
    float32_router = False
    tiny = 2.0**-24
    """Its softmax is over the chosen experts alone: nothing can become a tie."""
    gate = "block_sparse_moe.router.layer.weight"
    biased = (*QUERIES_KEYS_VALUES, "o_proj")

    def fields(self, config: CMoEConfig, needs: set[str]) -> dict[str, Any]:
        return {
            "intermediate_size": config.moe_intermediate_size,
            "shared_intermediate_size": config.shared_expert_intermediate_size,
            "num_local_experts": config.num_experts,
            "attention_bias": bool({"biases", "output bias"} & needs),
            "attention_multiplier": head_width(config) ** -0.5,
        }

    def shared_expert(self, parts: Parts, config: CMoEConfig) -> dict[str, Made]:
        if not config.shared_expert_intermediate_size:
            return {}
        gate, up, down = (
            parts[f"mlp.shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down")
        )
        return {
            "shared_mlp.input_linear.weight": Made.of(gate, up),
            "shared_mlp.output_linear.weight": Made.of(down),
        }

    def experts(self, parts: Parts, config: CMoEConfig) -> dict[str, Made]:
        down = Made.of(parts["mlp.experts.down_proj"], factor=self.down_factor(config))
        return {
            "block_sparse_moe.input_linear.weight": Made.of(parts["mlp.experts.gate_up_proj"]),
            "block_sparse_moe.output_linear.weight": down,
        }


class Glm4(Target):
    """Glm4Moe has sigmoids in float32, and a bias that only the selection sees."""

    name = "glm4"
    config_class, causal = Glm4MoeConfig, "Glm4MoeForCausalLM"
    router_class = Glm4MoeTopkRouter
    represents = frozenset({"shared", "pins", "leading", "biases", "norms"})
    float32_router = True
    few, tiny = 2.0**-4, 2.0**-10
    """Sigmoids of large scores are ties."""
    least_experts = 2
    bias = "mlp.gate.e_score_correction_bias"
    biased = QUERIES_KEYS_VALUES
    ties = False
    """vLLM 0.32 leaves the head of a tied model as memory happens to be, and answers with it."""

    def fields(self, config: CMoEConfig, needs: set[str]) -> dict[str, Any]:
        rope = {**(config.rope_parameters or {}), "partial_rotary_factor": 1.0}
        return {
            "rope_parameters": rope,
            "moe_intermediate_size": config.moe_intermediate_size,
            "n_routed_experts": config.num_experts,
            "n_shared_experts": config.num_shared or 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": float(config.num_experts_per_tok),
            "first_k_dense_replace": len(config.dense_layers or []),
            "attention_bias": "biases" in needs,
            "use_qk_norm": "norms" in needs,
            "head_dim": head_width(config),
            "num_nextn_predict_layers": 0,
        }

    def shared_expert(self, parts: Parts, config: CMoEConfig) -> dict[str, Made]:
        if config.num_shared:
            return super().shared_expert(parts, config)
        router, width = parts["mlp.gate.linear_weight"], config.moe_intermediate_size
        return zero_expert(self.shared, router, width, config.hidden_size)

    def down_factor(self, config: CMoEConfig) -> float:
        return 1


class Ernie(Target):
    """Ernie4.5-MoE has our softmax and bias, and dense layers at both ends."""

    name = "ernie"
    config_class, causal = Ernie4_5_MoeConfig, "Ernie4_5_MoeForCausalLM"
    router_class = Ernie4_5_MoeTopKRouter
    represents = frozenset({"shared", "pins", "leading", "trailing"})
    unread = frozenset({"pins", "balance"})  # on CPUs
    float32_router = True
    tiny = 2.0**-10
    bias = "mlp.moe_statics.e_score_correction_bias"
    interleaved = True

    def fields(self, config: CMoEConfig, needs: set[str]) -> dict[str, Any]:
        carved = carved_layers(config)
        return {
            "moe_intermediate_size": config.moe_intermediate_size,
            "moe_num_experts": config.num_experts,
            "moe_k": config.num_experts_per_tok,
            "moe_num_shared_experts": config.num_shared,
            "moe_layer_start_index": carved[0],
            "moe_layer_end_index": carved[-1],
            "moe_layer_interval": 1,
            "use_bias": False,
        }

    def refusals(self, config: CMoEConfig, needs: set[str]) -> list[str]:
        exact = {"balance"} if config.num_experts_per_tok == 1 else set()
        return super().refusals(config, needs - exact)

    def routing(self, parts: Parts, config: CMoEConfig) -> dict[str, Made]:
        made = super().routing(parts, config)
        bias = made[self.bias]
        return made | {self.bias: replace(bias, shape=(1, *bias.shape))}


class Qwen2(Target):
    """Qwen2Moe has a gate sigmoid(x w) on the shared expert: w = 0, and twice what it writes."""

    name = "qwen2"
    config_class, causal = Qwen2MoeConfig, "Qwen2MoeForCausalLM"
    router_class = Qwen2MoeTopKRouter
    represents = frozenset({"shared", "leading", "trailing", "between", "biases", "window"})
    float32_router = False
    shared = "mlp.shared_expert."
    biased, always_biased = QUERIES_KEYS_VALUES, True
    no_shared = 8
    """Neurons, all zero, of the shared expert that it insists on, where there is none."""

    def fields(self, config: CMoEConfig, needs: set[str]) -> dict[str, Any]:
        types = attention_types(config)
        shared = config.shared_expert_intermediate_size
        return super().fields(config, needs) | {
            "shared_expert_intermediate_size": shared or self.no_shared,
            "layer_types": types,
            "use_sliding_window": "sliding_attention" in types,
            "sliding_window": getattr(config, "sliding_window", None),
        }

    def shared_expert(self, parts: Parts, config: CMoEConfig) -> dict[str, Made]:
        router, hidden = parts["mlp.gate.linear_weight"], config.hidden_size
        zeros = zero_expert(self.shared, router, self.no_shared, hidden)
        made = super().shared_expert(parts, config) or zeros
        down = f"{self.shared}down_proj.weight"
        made[down] = replace(made[down], factor=2.0)
        return made | {"mlp.shared_expert_gate.weight": Made.zeros(router, 1, hidden)}


class Qwen3(Target):
    """Qwen3Moe has norms of queries and keys, and nothing that always runs."""

    name = "qwen3"
    config_class, causal = Qwen3MoeConfig, "Qwen3MoeForCausalLM"
    router_class = Qwen3MoeTopKRouter
    represents = frozenset({"norms", "leading", "trailing", "between", "biases", "output bias"})
    float32_router = False
    biased = (*QUERIES_KEYS_VALUES, "o_proj")

    def fields(self, config: CMoEConfig, needs: set[str]) -> dict[str, Any]:
        own = {"attention_bias": bool({"biases", "output bias"} & needs)}
        return super().fields(config, needs) | own

    def refusals(self, config: CMoEConfig, needs: set[str]) -> list[str]:
        reasons = super().refusals(config, needs)
        return reasons if "norms" in needs else [*reasons, "always has norms of queries and keys"]


TARGETS: dict[str, Target] = {
    target.name: target for target in (Granite(), Glm4(), Ernie(), Qwen2(), Qwen3())
}


def by_faithfulness(config: CMoEConfig, needs: set[str]) -> list[Target]:
    """Sort the targets: first what every engine reads, and what scores as precisely as we do."""

    def shortcomings(target: Target) -> tuple[bool, bool]:
        precise = config.dtype == torch.float32 or target.float32_router
        return bool(target.unread & needs), not precise

    return sorted(TARGETS.values(), key=shortcomings)


def head_width(config: CMoEConfig) -> int:
    """Return the width of a head of attention."""
    width = getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)
