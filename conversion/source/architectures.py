# SPDX-License-Identifier: Apache-2.0
"""What is known of a decoder that can be carved: its classes, its layers and its FFNs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import cmoe_hf
from cmoe_hf.families import MOE_FAMILIES

from ..errors import RequestError
from .ffn import DenseFFN
from .walk import Place

TESTED = (
    *("gpt_neox", "llama", "mistral", "qwen2", "qwen3"),
    *MOE_FAMILIES,
    *("arcee", "bloom", "cohere", "cohere2", "exaone4", "falcon", "falcon_h1", "gemma", "gemma2"),
    *("gemma3_text", "gemma4_text", "glm", "glm4", "gpt2", "gptj", "granite", "lfm2", "ministral"),
    *("nemotron", "olmo2", "olmo3", "opt", "phi", "phi3", "qwen3_5_text", "smollm3", "stablelm"),
    "starcoder2",
)
"""Families that the tests carve, on the lowest and the newest transformers."""
DIFFERS: dict[str, tuple[str, ...]] = {
    "llama": (),
    "mistral": (),
    "qwen2": ("biases",),
    "qwen3": ("norms",),
}
"""In what decoders differ from Llama's, by the names in `share.needs`, where it can be exported."""
EXPERT_WIDTHS = {"qwen3_moe": "moe_intermediate_size"}
"""Field of a MoE's configuration that has the width of its experts, if not `intermediate_size`."""
EXPERT_PARTS = {"mixtral": ("w1", "w3", "w2")}
"""Gate, up and down projection of an expert, if they have other names than Llama's."""
NORMALISED = ("mixtral",)
"""MoEs whose routers give weights that sum to 1, and have no field that says so."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder of transformers of which every layer has the same FFN, or the same experts."""

    dense_model: type[PreTrainedModel]
    """The causal model."""
    layers: str = "layers"
    """Name of the list of layers in the decoder."""
    layer_prefix: str = "model.layers.{}."
    """Of a layer's tensors in the causal model, with braces for its number."""
    ffn: DenseFFN
    """Of each layer; of each expert of a MoE, by names relative to the expert."""
    router: str | None = None
    """Weight of a MoE's router, relative to the layer."""
    expert_prefix: str = ""
    """Of an expert's tensors, with braces for its number, relative to the layer."""

    @property
    def model_type(self) -> str:
        """Return the name of the dense family."""
        kind: Any = self.dense_model.config_class
        return kind.model_type

    @property
    def cmoe_config(self) -> type[cmoe_hf.CMoEConfig]:
        """Return the configuration class of the carved family."""
        return cmoe_hf.carved_classes(self.model_type)[0]

    @property
    def cmoe_model(self) -> type[PreTrainedModel]:
        """Return the class of the carved causal model."""
        return cmoe_hf.carved_classes(self.model_type)[2]

    @property
    def block(self) -> str:
        """Return what the names of a block's tensors begin with, relative to the layer."""
        return f"{self.ffn.place.module}."

    @property
    def config_field(self) -> dict[str, Any]:
        """Return the field `ffn` of a carved model's configuration."""
        ffn = self.ffn
        return {
            "layers": self.layers,
            "module": ffn.place.module,
            "skipped": list(ffn.place.skipped),
            "gated": ffn.has_gate,
            "width": ffn.width,
            "activation": ffn.activation,
            "up_bias": ffn.up_bias,
            "down_bias": ffn.down_bias,
            "takes_residual": ffn.place.takes_residual,
        }


def gated_ffn(
    width: int, activation: str, parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> DenseFFN:
    """Return the FFN of Llama and its kin, or of an expert with other names for its `parts`."""
    gate, up, down = parts
    return DenseFFN(
        owner="mlp",
        kind="gated",
        gate=gate,
        up=up,
        down=down,
        width=width,
        activation=activation,
        place=Place("mlp"),
    )


def llama_architecture(config: PreTrainedConfig) -> Architecture:
    """Return the architecture of a Llama."""
    return Architecture(
        dense_model=LlamaForCausalLM, ffn=gated_ffn(config.intermediate_size, config.hidden_act)
    )


def moe_architecture(config: PreTrainedConfig, model: type[PreTrainedModel]) -> Architecture:
    """Return the architecture of a MoE of which the experts can be carved."""
    width = getattr(config, EXPERT_WIDTHS.get(config.model_type, "intermediate_size"))
    parts = EXPERT_PARTS.get(config.model_type, ("gate_proj", "up_proj", "down_proj"))
    return Architecture(
        dense_model=model,
        ffn=replace(gated_ffn(width, config.hidden_act, parts), owner=""),
        router="mlp.gate.weight",
        expert_prefix="mlp.experts.{}.",
    )


def dense_class(config: dict[str, Any]) -> type[PreTrainedConfig]:
    """Return the configuration class of a dense model, from its raw `config.json`.

    Raises `RequestError` for what cannot be carved, naming what was found.
    """
    model_type = str(config.get("model_type"))
    if model_type.startswith("cmoe_"):
        raise RequestError(f"cannot carve a model of type {model_type!r}: it is carved already.")
    for part, inner in config.items():
        if isinstance(inner, dict) and inner.get("model_type") in CONFIG_MAPPING:
            raise RequestError(
                f"cannot carve a model of type {model_type!r}: it has a {inner['model_type']} "
                f"inside ({part}) beside other parts, which a carved model would lose. Save the "
                "language model by itself, and carve that."
            )
    if model_type not in CONFIG_MAPPING or (
        CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        named = ", ".join(config.get("architectures") or []) or "no architecture named"
        raise RequestError(
            f"cannot carve a model of type {model_type!r} ({named}): this transformers has no "
            "causal language model of that type."
        )
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise RequestError(
            "cannot carve a MoE of which some layers are dense (mlp_only_layers or "
            "decoder_sparse_step): every layer must have experts."
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown method")
        raise RequestError(
            f"the checkpoint is quantised ({method}): neurons cannot be moved between packed "
            "weights. Carve the unquantised checkpoint and quantise the result."
        )
    dense = CONFIG_MAPPING[model_type]
    if clashing := sorted(clashing_fields(dense, config)):
        raise RequestError(
            f"cannot carve a model of type {model_type!r}: it has fields that a carved model needs "
            f"for itself ({', '.join(clashing)}). Of MoEs only {' and '.join(MOE_FAMILIES)} can be "
            "carved."
        )
    return dense


def clashing_fields(dense: type[PreTrainedConfig], config: dict[str, Any]) -> Iterator[str]:
    """Yield the fields in use that a dense family calls as carving does."""
    if dense.model_type in MOE_FAMILIES:
        return
    own = cmoe_hf.CMoEConfig.__annotations__.keys() - {"output_router_logits"}
    for name in own & {*getattr(dense, "__dataclass_fields__", ())}:
        if config.get(name) is not None:
            yield name


def dense_type(config: PreTrainedConfig) -> str:
    """Return the `model_type` of a dense model, or that which a carved one was carved from."""
    return config.model_type.removeprefix("cmoe_")


def differences(config: PreTrainedConfig) -> tuple[str, ...] | None:
    """Return in what a dense or carved model's decoder differs from Llama's; None if unknown."""
    return DIFFERS.get(dense_type(config))


def is_moe(config: PreTrainedConfig) -> bool:
    """Return whether a dense or carved model is of a MoE's family."""
    return dense_type(config) in MOE_FAMILIES
