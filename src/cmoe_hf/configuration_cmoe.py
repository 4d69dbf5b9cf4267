# SPDX-License-Identifier: Apache-2.0
"""Configuration of CMoE models: a dense configuration plus how its FFN is carved.

What a family needs of this file travels with its converted repositories. It may import torch,
transformers and huggingface_hub only, and nothing relative.
"""

import os
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.models.gpt_neox.configuration_gpt_neox import GPTNeoXConfig
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

ROUTER_TYPES = ("representative", "linear")


EXPERTS_PLAN = {
    "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "layers.*.mlp.experts.down_proj": "rowwise",
    "layers.*.mlp.experts": "moe_tp_experts",
}


FFN_PLAN = EXPERTS_PLAN | {
    "layers.*.mlp.shared_expert.gate_proj": "colwise",
    "layers.*.mlp.shared_expert.up_proj": "colwise",
    "layers.*.mlp.shared_expert.down_proj": "rowwise",
}


PLAIN_FFN_PLAN = {
    "layers.*.mlp.shared_expert.up_proj": "colwise",
    "layers.*.mlp.shared_expert.down_proj": "rowwise",
    "layers.*.mlp.experts.up_proj": "colwise",
    "layers.*.mlp.experts.up_proj_bias": "rowwise",  # the last axis, where colwise takes the first
    "layers.*.mlp.experts.down_proj": "rowwise",
    "layers.*.mlp.experts": "moe_tp_experts",
}


def expert_parallel_plan(ffn: dict[str, str]) -> dict[str, Any]:
    """Plan whole experts on each rank. Needs transformers 5.20, which changed the plan's names."""
    names = [name for name in ffn if ".mlp.experts" in name]
    kinds = {True: "ep_dispatch_experts", False: "grouped_gemm"}
    return {name: kinds[name.endswith("experts")] for name in names}


def tensor_parallel_plan(
    dense: type[PreTrainedConfig], ffn: dict[str, str] = FFN_PLAN
) -> dict[str, str]:
    """Return the dense family's plan with a carved FFN in place of the dense one."""
    plan = dense.base_model_tp_plan or {}
    return {name: how for name, how in plan.items() if ".mlp." not in name} | ffn


def with_legacy_keys(config: PreTrainedConfig, written: dict[str, Any]) -> dict[str, Any]:
    """Return what is written of a configuration, with the names of transformers 4 added.

    Engines of that time do not look for `rope_parameters` and take another theta without a word.
    Parameters by type of layer have no older form.
    """
    older = {"torch_dtype": written["dtype"]} if written.get("dtype") is not None else {}
    rope = dict(written.get("rope_parameters") or {})
    if "rope_theta" in rope:
        neox = config.model_type.endswith("gpt_neox")
        older["rotary_emb_base" if neox else "rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            part = rope.pop("partial_rotary_factor")
            older["rotary_pct" if neox else "partial_rotary_factor"] = part
        if rope.get("rope_type", "default") != "default":
            older["rope_scaling"] = rope
    return written | older


def check_lists(name: str, lists: list[list[int]], layers: int, most: int, count: int) -> None:
    """Raise `ValueError` unless each layer has a list of at most `most` numbers below `count`."""
    if len(lists) != layers:
        raise ValueError(f"{name} has {len(lists)} lists for {layers} layers.")
    for index, numbers in enumerate(lists):
        if wrong := [number for number in numbers if not 0 <= number < count]:
            raise ValueError(f"{name} names {wrong[0]} in layer {index}, but there are {count}.")
        if len({*numbers}) != len(numbers) or len(numbers) > most:
            raise ValueError(f"{name} of layer {index} is {numbers}: each once, at most {most}.")


@strict
class CMoEConfig(PreTrainedConfig):
    """Configuration of a dense family with the fields that carving adds.

    All fields of that configuration keep their meaning; `intermediate_size` stays the width of the
    dense FFN, so that `shared_expert_intermediate_size + num_experts * moe_intermediate_size`
    equals it. In the paper's notation SxAyEz, x is `num_shared`, y is `num_experts_per_tok` and
    z is `num_shared + num_experts`.
    """

    attribute_map = {"num_local_experts": "num_experts"}

    has_gate = True
    """h = act(x Wg) * (x Wu); without a gate, h = act(x W + b)."""
    num_parents = num_parents_per_tok = 1
    """Of a hierarchical model, see `CMoEHierarchicalConfig`."""

    base_model_ep_plan = expert_parallel_plan(FFN_PLAN)

    num_experts: int = 7
    """Routed experts, Nr."""
    num_experts_per_tok: int = 1
    """Routed experts run for each token, A; 0 runs the shared expert alone (static pruning)."""
    moe_intermediate_size: int = 0
    """Neurons of each routed expert, m; 0 stands for an eighth of `intermediate_size`."""
    shared_expert_intermediate_size: int = -1
    """Neurons of the shared expert, S * m; 0 for none, -1 for all that the routed ones leave."""
    router_type: str = "representative"
    """`"representative"`: the score is the activation of one chosen neuron per expert (paper,
    eq. 8). `"linear"`: the score is a linear function of the FFN input."""
    router_absolute_score: bool = False
    """Use the absolute value of the score, as the authors' released code does."""
    dense_layers: list[int] | None = None
    """Layers whose FFN is the dense one."""
    always_on_experts: list[list[int]] | None = None
    """For each layer the routed experts that run for every token, which their balance bias sees to;
    None if there are none. Models carved by cmoe-hf 0.2 and before do not say it."""
    norm_topk_prob: bool = False
    """Always false: the gate weights 1 + softmax(score) * u are never renormalised."""
    output_router_logits: bool = False
    """Return the router scores of every layer with each forward pass."""

    def __post_init__(self, **kwargs: Any) -> None:
        if getattr(self, "rope_parameters", None):
            kwargs.pop("rope_scaling", None)  # the older name of the same, which else would win
        super().__post_init__(**kwargs)
        self.moe_intermediate_size = self.moe_intermediate_size or self.intermediate_size // 8
        if self.shared_expert_intermediate_size < 0:
            routed = self.num_experts // self.num_parents * self.moe_intermediate_size
            self.shared_expert_intermediate_size = self.intermediate_size - routed
        if self.dense_layers:
            plan = super().base_model_tp_plan or {}
            # Of this model only: without dense layers the library would warn of unused rules.
            self.base_model_tp_plan = plan | (self.base_model_tp_plan or {})  # type: ignore[misc]
        if not getattr(self, "auto_map", None):
            self.auto_map = self.local_auto_map()

    @property
    def num_shared(self) -> int:
        """Shared units of m neurons, S."""
        return self.shared_expert_intermediate_size // self.moe_intermediate_size

    @property
    def notation(self) -> str:
        """The paper's name of this shape, for example `S3A3E8`."""
        active = self.num_experts_per_tok // self.num_parents_per_tok
        experts = self.num_shared + self.num_experts // self.num_parents
        return f"S{self.num_shared}A{active}E{experts}"

    @property
    def activation_ratio(self) -> float:
        """Share of the FFN neurons that run for a token: (S + A) / E, and all of dense layers."""
        active = self.num_experts_per_tok // self.num_parents_per_tok * self.moe_intermediate_size
        ratio = (self.shared_expert_intermediate_size + active) / self.intermediate_size
        return ratio + (1 - ratio) * len(self.dense_layers or []) / self.num_hidden_layers

    @classmethod
    def local_auto_map(cls) -> dict[str, str]:
        """Name the classes of the code beside the weights; vLLM needs `AutoModel` too."""
        family = cls.__name__.removesuffix("Config")
        return {
            "AutoConfig": f"configuration_cmoe.{family}Config",
            "AutoModel": f"modeling_cmoe.{family}Model",
            "AutoModelForCausalLM": f"modeling_cmoe.{family}ForCausalLM",
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what is written to `config.json`."""
        return with_legacy_keys(self, super().to_diff_dict())

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save; the entries of `auto_map` point at the files saved beside the configuration.

        A configuration loaded from the Hub carries `auto_map` entries that name the repository
        it came from; the library would rewrite only those of the classes being saved.
        """
        self.auto_map = self.local_auto_map()
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def validate_architecture(self) -> None:
        """Check, as part of the strict validation, that the parts add up to the dense FFN."""
        super().validate_architecture()
        experts, odd = divmod(self.num_experts, self.num_parents)
        active, uneven = divmod(self.num_experts_per_tok, self.num_parents_per_tok)
        if odd or uneven:
            raise ValueError(
                f"num_experts ({self.num_experts}) must be a multiple of num_parents "
                f"({self.num_parents}), and num_experts_per_tok ({self.num_experts_per_tok}) of "
                f"num_parents_per_tok ({self.num_parents_per_tok})."
            )
        routed = experts * self.moe_intermediate_size
        if self.shared_expert_intermediate_size + routed != self.intermediate_size:
            raise ValueError(
                f"shared_expert_intermediate_size ({self.shared_expert_intermediate_size}) plus "
                f"num_experts * moe_intermediate_size ({experts} * {self.moe_intermediate_size}) "
                f"must equal intermediate_size ({self.intermediate_size})."
            )
        if not 0 <= active <= experts:
            raise ValueError(
                f"num_experts_per_tok ({active}) must be between 0 and num_experts ({experts})."
            )
        if self.shared_expert_intermediate_size == self.num_experts_per_tok == 0:
            raise ValueError("Without a shared expert, num_experts_per_tok must be at least 1.")
        if self.always_on_experts is not None:
            most = (self.num_hidden_layers, self.num_experts_per_tok, self.num_experts)
            check_lists("always_on_experts", self.always_on_experts, *most)
        dense = self.dense_layers or []
        if wrong := [index for index in dense if not 0 <= index < self.num_hidden_layers]:
            raise ValueError(
                f"dense_layers names layer {wrong[0]}, but there are {self.num_hidden_layers}."
            )
        if len({*dense}) != len(dense) or len(dense) == self.num_hidden_layers:
            raise ValueError(f"dense_layers is {dense}: each once, and not all of the layers.")
        if self.router_type not in ROUTER_TYPES:
            raise ValueError(
                f"router_type is {self.router_type!r}; it must be one of {ROUTER_TYPES}."
            )


@strict
class CMoELlamaConfig(CMoEConfig, LlamaConfig):
    """A Llama whose FFNs are carved."""

    model_type = "cmoe_llama"
    base_model_tp_plan = tensor_parallel_plan(LlamaConfig)


@strict
class CMoEMistralConfig(CMoEConfig, MistralConfig):
    """A Mistral whose FFNs are carved."""

    model_type = "cmoe_mistral"
    base_model_tp_plan = tensor_parallel_plan(MistralConfig)


@strict
class CMoEQwen2Config(CMoEConfig, Qwen2Config):
    """A Qwen2 whose FFNs are carved."""

    model_type = "cmoe_qwen2"
    base_model_tp_plan = tensor_parallel_plan(Qwen2Config)


@strict
class CMoEQwen3Config(CMoEConfig, Qwen3Config):
    """A Qwen3 whose FFNs are carved."""

    model_type = "cmoe_qwen3"
    base_model_tp_plan = tensor_parallel_plan(Qwen3Config)


@strict
class CMoEGPTNeoXConfig(CMoEConfig, GPTNeoXConfig):
    """A GPT-NeoX or Pythia whose FFNs are carved: they have biases and no gate."""

    model_type = "cmoe_gpt_neox"
    attribute_map = CMoEConfig.attribute_map | {"rms_norm_eps": "layer_norm_eps"}
    has_gate = False
    base_model_tp_plan = tensor_parallel_plan(GPTNeoXConfig, PLAIN_FFN_PLAN)
    base_model_pp_plan = {  # the decoder's parts are named as in the other families
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    base_model_ep_plan = expert_parallel_plan(PLAIN_FFN_PLAN)


@strict
class CMoEHierarchicalConfig(CMoEConfig):
    """A MoE whose experts, here called parents, are carved each (paper, eq. 10).

    `num_experts`, `num_experts_per_tok` and `moe_intermediate_size` speak of the small experts of
    all parents together, so that the packed tensors have the shapes that tools expect of them;
    `intermediate_size` is the width of one parent, `shared_expert_intermediate_size` what of it
    always runs. Notation and activation ratio are those within a parent.
    """

    num_parents: int = 8
    """Experts of the source."""
    num_parents_per_tok: int = 2
    """How many of them the source's router picks for a token."""
    norm_parent_prob: bool = False
    """Renormalise their weights to a sum of 1, as the source does (its `norm_topk_prob`)."""
    flat_routing: bool = False
    """Experts of all parents of a token compete with each other, not only within each parent."""
    kept_parents: list[list[int]] | None = None
    """For each layer the parents of which everything runs: calibration saw too little of them."""

    # Written again: a field's default hides what the base class says.
    num_experts: int = 56
    num_experts_per_tok: int = 2

    def validate_architecture(self) -> None:
        """Check the fields of parents, as part of the strict validation."""
        super().validate_architecture()
        if self.dense_layers:
            raise ValueError("dense_layers are those of a dense source; this one is a MoE.")
        if not 1 <= self.num_parents_per_tok <= self.num_parents:
            raise ValueError(
                f"num_parents_per_tok ({self.num_parents_per_tok}) must be between 1 and "
                f"num_parents ({self.num_parents})."
            )
        if self.kept_parents is not None:
            most = (self.num_hidden_layers, self.num_parents, self.num_parents)
            check_lists("kept_parents", self.kept_parents, *most)
        if self.flat_routing and self.router_type != "linear":
            raise ValueError("flat_routing needs scores of a linear router.")


HIERARCHICAL_FFN_PLAN = EXPERTS_PLAN | {
    name.replace(".experts", ".shared_experts"): how for name, how in EXPERTS_PLAN.items()
}


@strict
class CMoEQwen3MoeConfig(CMoEHierarchicalConfig, Qwen3MoeConfig):
    """A Qwen3-MoE whose experts are carved."""

    model_type = "cmoe_qwen3_moe"
    attribute_map = CMoEConfig.attribute_map
    base_model_tp_plan = tensor_parallel_plan(Qwen3MoeConfig, HIERARCHICAL_FFN_PLAN)


@strict
class CMoEOlmoeConfig(CMoEHierarchicalConfig, OlmoeConfig):
    """An OLMoE whose experts are carved."""

    model_type = "cmoe_olmoe"
    base_model_tp_plan = tensor_parallel_plan(OlmoeConfig, HIERARCHICAL_FFN_PLAN)
