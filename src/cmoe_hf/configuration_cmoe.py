# SPDX-License-Identifier: Apache-2.0
"""Configuration of CMoE models: a dense configuration plus how its FFN is carved.

What a family needs of this file travels with its converted repositories. It may import torch,
transformers and huggingface_hub only, and nothing relative.
"""

import os
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

ROUTER_TYPES = ("representative", "linear")


FFN_FIELDS = {
    "layers": str,
    "module": str,
    "skipped": list,
    "gated": bool,
    "width": int,
    "activation": str,
    "up_bias": bool,
    "down_bias": bool,
    "takes_residual": bool,
}
"""What `CMoEConfig.ffn` says, and in which type."""


def experts_plan(module: str, gated: bool) -> dict[str, str]:
    """Return how tensor parallelism splits the packed experts `module`."""
    inputs = {"gate_up_proj": "packed_colwise"}
    if not gated:  # of a bias the last axis, where colwise takes the first
        inputs = {"up_proj": "colwise", "up_proj_bias": "rowwise"}
    plan = {f"{module}.{name}": how for name, how in (inputs | {"down_proj": "rowwise"}).items()}
    return plan | {module: "moe_tp_experts"}


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

    num_parents = num_parents_per_tok = 1
    """Of a hierarchical model, see `CMoEHierarchicalConfig`."""

    ffn: Any = None
    """The FFN that the blocks stand for. `layers` names the list of layers in the decoder, `module`
    the FFN in a layer, or its first part where a layer calls the parts itself; the other ones are
    `skipped`. `gated`: h = act(x Wg) * (x Wu) instead of h = act(x Wu); `width`, `activation`,
    `up_bias` (also of the gate) and `down_bias` tell the rest, `takes_residual` whether it is
    called with the residual and adds it. None in models of cmoe-hf 0.2 and before."""
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

    def __init_subclass__(cls, **options: Any) -> None:
        """Join the names that the dense family and carving have for fields."""
        super().__init_subclass__(**options)
        family, own = super().attribute_map, CMoEConfig.attribute_map
        ours = {*own.keys(), *own.values()}  # a MoE may call them otherwise
        kept = {name: field for name, field in family.items() if not {name, field} & ours}
        cls.attribute_map = kept | own

    def __post_init__(self, **kwargs: Any) -> None:
        if getattr(self, "rope_parameters", None):
            kwargs.pop("rope_scaling", None)  # the older name of the same, which else would win
        super().__post_init__(**kwargs)
        if self.ffn is None:
            self.ffn = self.ffn_before()
        self.moe_intermediate_size = self.moe_intermediate_size or self.ffn_width // 8
        if self.shared_expert_intermediate_size < 0:
            routed = self.num_experts // self.num_parents * self.moe_intermediate_size
            self.shared_expert_intermediate_size = self.ffn_width - routed
        if self.base_model_tp_plan:
            ffn = f"{self.ffn['layers']}.*.{self.ffn['module']}"
            # Without dense layers the library would warn of unused rules.
            kept = {
                name: how
                for name, how in self.base_model_tp_plan.items()
                if self.dense_layers or not name.startswith(ffn)
            }
            self.base_model_tp_plan = kept | self.block_plan  # type: ignore[misc]
        if not getattr(self, "auto_map", None):
            self.auto_map = self.local_auto_map()

    def ffn_before(self) -> dict[str, Any]:
        """Return the FFN of a model of cmoe-hf 0.2 and before, or of a default configuration."""
        plain = self.model_type == "cmoe_gpt_neox"
        width = getattr(self, "intermediate_size", None)
        return {
            "layers": "layers",
            "module": "mlp",
            "skipped": [],
            "gated": not plain,
            "width": width if isinstance(width, int) else 4 * self.hidden_size,
            "activation": getattr(self, "hidden_act", "silu"),
            "up_bias": plain,
            "down_bias": plain,
            "takes_residual": False,
        }

    @property
    def has_gate(self) -> bool:
        """Return whether h = act(x Wg) * (x Wu); without a gate, h = act(x Wu)."""
        return self.ffn["gated"]

    @property
    def ffn_width(self) -> int:
        """Neurons of a dense FFN, or of one expert of a MoE."""
        return self.ffn["width"]

    @property
    def block_plan(self) -> dict[str, str]:
        """Tensor parallel plan of the blocks."""
        block = f"{self.ffn['layers']}.*.{self.ffn['module']}"
        plan = experts_plan(f"{block}.experts", self.has_gate)
        if self.num_parents > 1:
            return plan | experts_plan(f"{block}.shared_experts", self.has_gate)
        inputs = ("gate_proj", "up_proj") if self.has_gate else ("up_proj",)
        plan |= {f"{block}.shared_expert.{name}": "colwise" for name in inputs}
        return plan | {f"{block}.shared_expert.down_proj": "rowwise"}

    @property
    def base_model_ep_plan(self) -> dict[str, Any]:  # type: ignore[override]
        """Whole experts on each rank. Needs transformers 5.20: the plan's names changed there."""
        kinds = {True: "ep_dispatch_experts", False: "grouped_gemm"}
        names = [name for name in self.block_plan if ".experts" in name]
        return {name: kinds[name.endswith(".experts")] for name in names}

    @property
    def num_shared(self) -> int:
        """Shared units of m neurons, S."""
        return self.shared_expert_intermediate_size // self.moe_intermediate_size

    @property
    def notation(self) -> str:
        """Return the paper's name of this shape, for example `S3A3E8`."""
        active = self.num_experts_per_tok // self.num_parents_per_tok
        experts = self.num_shared + self.num_experts // self.num_parents
        return f"S{self.num_shared}A{active}E{experts}"

    @property
    def activation_ratio(self) -> float:
        """Share of the FFN neurons that run for a token: (S + A) / E, and all of dense layers."""
        active = self.num_experts_per_tok // self.num_parents_per_tok * self.moe_intermediate_size
        ratio = (self.shared_expert_intermediate_size + active) / self.ffn_width
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
        """Save it; the entries of `auto_map` point at the files saved beside the configuration.

        A configuration loaded from the Hub carries `auto_map` entries that name the repository
        it came from; the library would rewrite only those of the classes being saved.
        """
        self.auto_map = self.local_auto_map()
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def validate_layer_type(self) -> None:
        """Check the types of layers. transformers 5.16 renames some of them in custom code."""
        types = getattr(self, "layer_types", None)
        super().validate_layer_type()
        if getattr(self, "layer_types", None) != types:
            self.layer_types = types

    def validate_architecture(self) -> None:
        """Check, as part of the validation, that the parts add up to the dense FFN."""
        super().validate_architecture()
        ffn = self.ffn or {}
        if unfit := [key for key, kind in FFN_FIELDS.items() if type(ffn.get(key)) is not kind]:
            raise ValueError(f"ffn is {ffn}: {unfit[0]} must be a {FFN_FIELDS[unfit[0]].__name__}.")
        experts, odd = divmod(self.num_experts, self.num_parents)
        active, uneven = divmod(self.num_experts_per_tok, self.num_parents_per_tok)
        if odd or uneven:
            raise ValueError(
                f"num_experts ({self.num_experts}) must be a multiple of num_parents "
                f"({self.num_parents}), and num_experts_per_tok ({self.num_experts_per_tok}) of "
                f"num_parents_per_tok ({self.num_parents_per_tok})."
            )
        routed = experts * self.moe_intermediate_size
        if self.shared_expert_intermediate_size + routed != self.ffn_width:
            raise ValueError(
                f"shared_expert_intermediate_size ({self.shared_expert_intermediate_size}) plus "
                f"num_experts * moe_intermediate_size ({experts} * {self.moe_intermediate_size}) "
                f"must equal intermediate_size ({self.ffn_width})."
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


__all__ = ["CMoEConfig", "CMoEHierarchicalConfig"]
