# SPDX-License-Identifier: Apache-2.0
"""The architectures of transformers that a carved model can become.

Our routing weights are 1; theirs are made of the scores and sum to 1 over the A chosen experts.
With several, the router is scaled by a power of two so small that the weights are even, which keeps
the order of the scores, and the experts' outputs are multiplied by A. Where an architecture scores
in 16 bits, other experts are chosen where two scores are close. Pinned experts need a bias that
only the selection sees; ours is above all probabilities and all sigmoids.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.ernie4_5_moe.configuration_ernie4_5_moe import Ernie4_5_MoeConfig
from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig
from transformers.models.granitemoeshared.configuration_granitemoeshared import (
    GraniteMoeSharedConfig,
)

from cmoe_hf import CMoEConfig

from ..source.library import attention_types
from ..source.stored import TensorRef
from .needs import Stock, carved_layers, head_width
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
Fields = dict[str, Any]
Parts = Mapping[str, TensorRef]
"""Tensors of a layer, by the rest of their names."""


@dataclass(frozen=True, kw_only=True)
class Target(Stock):
    """An architecture of transformers. The defaults are what most of them have."""

    config_class: type[PreTrainedConfig]
    fields: Callable[[CMoEConfig, set[str]], Fields]
    """Return the fields of its configuration beside `SAME_FIELDS`."""
    unread: frozenset[str] = frozenset()
    """What of that which it represents vLLM ignores silently."""
    float32_router: bool = False
    """Whether it scores experts in float32 in any model."""
    few: float = 1.0
    tiny: float = 2.0**-13
    """Scales of the router for one active expert, and for several. A smaller one would round close
    scores of a float32 softmax to ties, a larger one would make the weights uneven."""
    routed_scale: bool = False
    """Whether its configuration says the factor of the experts' outputs."""
    least_experts: int = 1
    gate: str = "mlp.gate.weight"
    bias: str | None = None
    bias_rows: tuple[int, ...] = ()
    same_choice: bool = False
    """Whether it chooses by our softmax and bias, which alone matter if one expert runs."""
    shared: str = "mlp.shared_experts."
    least_shared: Callable[[CMoEConfig], int] = lambda config: 0
    """Return the neurons of the shared expert, all zero, that it insists on where there is none."""
    shared_gate: str | None = None
    """A gate sigmoid(x w) on the shared expert: w = 0, and the expert writes twice as much."""
    packed: bool = False
    """Whether the experts of a layer are one tensor, and gate and up projections are joined."""
    biased: tuple[str, ...] = ()
    """Projections of attention that have biases, if any has."""
    always_biased: bool = False
    ties: bool = True
    """Whether every engine takes the embeddings for a head that is not there."""

    @property
    def causal(self) -> str:
        """Return the name of its class in transformers."""
        return self.config_class.__name__.removesuffix("Config") + "ForCausalLM"

    def refusals(self, config: CMoEConfig, needs: set[str]) -> list[str]:
        """Return why it cannot be this model."""
        several = config.num_experts_per_tok > 1
        exact = {"balance"} if self.same_choice and not several else set()
        reasons = super().refusals(config, needs - exact)
        if config.num_experts < self.least_experts:
            reasons.append(f"has at least {self.least_experts} routed experts")
        if config.dtype == torch.float16 and several and not self.float32_router:
            reasons.append("float16 is too coarse for the scores: convert with --dtype bfloat16")
        return reasons

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
        routes = "mlp.experts.down_proj" in parts
        made = {
            part: Made.of(it, interleaved=self.interleaved_heads(part, config))
            for part, it in parts.items()
            if not (routes and part.startswith("mlp."))
        }
        if "o_proj" not in self.biased:
            made.pop("self_attn.o_proj.bias", None)  # it is zero: else the model is refused
        biased = self.always_biased or "self_attn.q_proj.bias" in parts
        for name in self.biased if biased else ():
            weight = parts[f"self_attn.{name}.weight"]
            made.setdefault(f"self_attn.{name}.bias", Made.zeros(weight, weight.shape[0]))
        if routes:
            made |= self.routing(parts, config) | self.shared_expert(parts, config)
            made |= self.experts(parts, config)
        return made

    def routing(self, parts: Parts, config: CMoEConfig) -> dict[str, Made]:
        """Return the router, and the bias that pins experts."""
        scale = self.few if config.num_experts_per_tok == 1 else self.tiny
        router = Made.of(parts["mlp.gate.linear_weight"], factor=scale)
        made = {self.gate: replace(router, dtype="F32") if self.float32_router else router}
        if self.bias is not None:
            bias = Made.of(parts["mlp.gate.balance_bias"])
            made[self.bias] = replace(bias, shape=(*self.bias_rows, *bias.shape))
        return made

    def shared_expert(self, parts: Parts, config: CMoEConfig) -> dict[str, Made]:
        """Return what always runs."""
        router, hidden = parts["mlp.gate.linear_weight"], config.hidden_size
        factor = 1.0 if self.shared_gate is None else 2.0
        if config.shared_expert_intermediate_size:
            gate, up, down = (
                parts[f"mlp.shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down")
            )
            if self.packed:
                return {
                    "shared_mlp.input_linear.weight": Made.of(gate, up),
                    "shared_mlp.output_linear.weight": Made.of(down),
                }
            three = [Made.of(gate), Made.of(up), Made.of(down, factor=factor)]
        elif width := self.least_shared(config):
            inner, outer = Made.zeros(router, width, hidden), Made.zeros(router, hidden, width)
            three = [inner, inner, outer]
        else:
            return {}
        names = [f"{self.shared}{name}_proj.weight" for name in ("gate", "up", "down")]
        made = dict(zip(names, three, strict=True))
        if self.shared_gate is not None:
            made[self.shared_gate] = Made.zeros(router, 1, hidden)
        return made

    def experts(self, parts: Parts, config: CMoEConfig) -> dict[str, Made]:
        """Return the routed experts."""
        gate_up, down = parts["mlp.experts.gate_up_proj"], parts["mlp.experts.down_proj"]
        factor = 1.0 if self.routed_scale else float(config.num_experts_per_tok)
        if self.packed:
            return {
                "block_sparse_moe.input_linear.weight": Made.of(gate_up),
                "block_sparse_moe.output_linear.weight": Made.of(down, factor=factor),
            }
        made = {}
        for number in range(config.num_experts):
            expert = f"mlp.experts.{number}."
            made[f"{expert}gate_proj.weight"] = Made.of(gate_up.of_expert(number, 0, 2))
            made[f"{expert}up_proj.weight"] = Made.of(gate_up.of_expert(number, 1, 2))
            made[f"{expert}down_proj.weight"] = Made.of(down.of_expert(number, 0, 1), factor=factor)
        return made


def routed_fields(config: CMoEConfig) -> Fields:
    """Return how both Qwens say what is routed."""
    return {
        "moe_intermediate_size": config.moe_intermediate_size,
        "num_experts": config.num_experts,
        "norm_topk_prob": True,
        "mlp_only_layers": list(config.dense_layers or []),
    }


ALL = (
    Target(  # Its softmax is over the chosen experts alone: nothing can become a tie.
        name="granite",
        config_class=GraniteMoeSharedConfig,
        fields=lambda config, needs: {
            "intermediate_size": config.moe_intermediate_size,
            "shared_intermediate_size": config.shared_expert_intermediate_size,
            "num_local_experts": config.num_experts,
            "attention_bias": bool({"biases", "output bias"} & needs),
            "attention_multiplier": head_width(config) ** -0.5,
        },
        represents=frozenset({"shared", "biases", "output bias"}),
        unread=frozenset({"biases", "output bias"}),
        tiny=2.0**-24,
        gate="block_sparse_moe.router.layer.weight",
        packed=True,
        biased=(*QUERIES_KEYS_VALUES, "o_proj"),
    ),
    Target(  # Sigmoids of large scores are ties.
        name="glm4",
        config_class=Glm4MoeConfig,
        fields=lambda config, needs: {
            "rope_parameters": {**(config.rope_parameters or {}), "partial_rotary_factor": 1.0},
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
        },
        represents=frozenset({"shared", "pins", "leading", "biases", "norms"}),
        float32_router=True,
        few=2.0**-4,
        tiny=2.0**-10,
        routed_scale=True,
        least_experts=2,
        bias="mlp.gate.e_score_correction_bias",
        least_shared=lambda config: config.moe_intermediate_size,
        biased=QUERIES_KEYS_VALUES,
        ties=False,  # vLLM 0.32 leaves the head of a tied model as memory happens to be
    ),
    Target(
        name="ernie",
        config_class=Ernie4_5_MoeConfig,
        fields=lambda config, needs: {
            "moe_intermediate_size": config.moe_intermediate_size,
            "moe_num_experts": config.num_experts,
            "moe_k": config.num_experts_per_tok,
            "moe_num_shared_experts": config.num_shared,
            "moe_layer_start_index": carved_layers(config)[0],
            "moe_layer_end_index": carved_layers(config)[-1],
            "moe_layer_interval": 1,
            "use_bias": False,
        },
        represents=frozenset({"shared", "pins", "leading", "trailing"}),
        unread=frozenset({"pins", "balance"}),  # on CPUs
        float32_router=True,
        tiny=2.0**-10,
        bias="mlp.moe_statics.e_score_correction_bias",
        bias_rows=(1,),
        same_choice=True,
        interleaved=True,
    ),
    Target(
        name="qwen2",
        config_class=Qwen2MoeConfig,
        fields=lambda config, needs: {
            **routed_fields(config),
            "shared_expert_intermediate_size": config.shared_expert_intermediate_size or 8,
            "layer_types": attention_types(config),
            "use_sliding_window": "sliding_attention" in attention_types(config),
            "sliding_window": getattr(config, "sliding_window", None),
        },
        represents=frozenset({"shared", "leading", "trailing", "between", "biases", "window"}),
        shared="mlp.shared_expert.",
        least_shared=lambda config: 8,
        shared_gate="mlp.shared_expert_gate.weight",
        biased=QUERIES_KEYS_VALUES,
        always_biased=True,
    ),
    Target(
        name="qwen3",
        config_class=Qwen3MoeConfig,
        fields=lambda config, needs: {
            **routed_fields(config),
            "attention_bias": bool({"biases", "output bias"} & needs),
        },
        represents=frozenset({"norms", "leading", "trailing", "between", "biases", "output bias"}),
        wants=frozenset({"norms"}),
        biased=(*QUERIES_KEYS_VALUES, "o_proj"),
    ),
)
TARGETS = {target.name: target for target in ALL}


def by_faithfulness(config: CMoEConfig, needs: set[str]) -> list[Target]:
    """Sort the targets: first what every engine reads, and what scores as precisely as we do."""

    def shortcomings(target: Target) -> tuple[bool, bool]:
        precise = config.dtype == torch.float32 or target.float32_router
        return bool(target.unread & needs), not precise

    return sorted(ALL, key=shortcomings)
