# SPDX-License-Identifier: Apache-2.0
"""How each model family names its parts. CONTRIBUTING.md says how to add one."""

import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    OlmoeForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

import cmoe_hf

from ..errors import RequestError
from .stored import read_headers


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A dense family that can be carved, and the CMoE classes it becomes."""

    dense_model: Any
    """Class of the dense causal model."""
    layer_prefix: str = "model.layers.{}."
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    """Not stored when the configuration ties it to the embedding."""
    gate: str | None = "mlp.gate_proj.weight"
    """None for an FFN without a gate, of which `up_bias` and `down_bias` are named."""
    up: str = "mlp.up_proj.weight"
    up_bias: str | None = None
    down: str = "mlp.down_proj.weight"
    down_bias: str | None = None
    router: str | None = None
    """Of a MoE. `gate`, `up` and `down` are then those of an expert, behind `expert_prefix`."""
    expert_prefix: str = "mlp.experts.{}."
    expert_width: str = "intermediate_size"
    """Field of the configuration."""
    lora: tuple[str, ...] = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )
    """Linear layers, dense or carved, that recovery adapts by LoRA."""
    differs: tuple[str, ...] | None = None
    """In what its decoder differs from Llama's, by the names in `share.needs`; None if unknown: its
    carved models cannot be exported."""
    driver: str = "pipeline"
    """The module of `carve` that walks its layers."""
    ignored_suffixes: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Tensors of old checkpoints that are recomputed and not stored again."""

    @property
    def dense_config(self) -> type[PreTrainedConfig]:
        """Return the configuration class of the dense family."""
        return self.dense_model.config_class

    @property
    def cmoe_config(self) -> type[cmoe_hf.CMoEConfig]:
        """Return the configuration class of the carved family."""
        return cmoe_hf.carved_classes(self.dense_config.model_type)[0]

    @property
    def cmoe_model(self) -> type[PreTrainedModel]:
        """Return the class of the carved causal model."""
        return cmoe_hf.carved_classes(self.dense_config.model_type)[2]

    @property
    def decoder_layer(self) -> type[nn.Module]:
        """Return the class of a layer, of which `mlp` is the FFN."""
        return self._beside_model(*self.dense_model._no_split_modules)

    @property
    def rotary_embedding(self) -> type[nn.Module]:
        """Return the class of the position embeddings."""
        stem = self.dense_model.__name__.removesuffix("ForCausalLM")
        return self._beside_model(f"{stem}RotaryEmbedding")

    def _beside_model(self, name: str) -> type[nn.Module]:
        return getattr(sys.modules[self.dense_model.__module__], name)


MOE: dict[str, Any] = {
    "driver": "hierarchy",
    "router": "mlp.gate.weight",
    "gate": "gate_proj.weight",
    "up": "up_proj.weight",
    "down": "down_proj.weight",
}
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(dense_model=LlamaForCausalLM, differs=()),
    "mistral": Architecture(dense_model=MistralForCausalLM, differs=()),
    "qwen2": Architecture(dense_model=Qwen2ForCausalLM, differs=("biases",)),
    "qwen3": Architecture(dense_model=Qwen3ForCausalLM, differs=("norms",)),
    "qwen3_moe": Architecture(
        dense_model=Qwen3MoeForCausalLM, **MOE, expert_width="moe_intermediate_size"
    ),
    "olmoe": Architecture(dense_model=OlmoeForCausalLM, **MOE),
    "gpt_neox": Architecture(
        dense_model=GPTNeoXForCausalLM,
        layer_prefix="gpt_neox.layers.{}.",
        embedding="gpt_neox.embed_in.weight",
        head="embed_out.weight",
        gate=None,
        up="mlp.dense_h_to_4h.weight",
        up_bias="mlp.dense_h_to_4h.bias",
        down="mlp.dense_4h_to_h.weight",
        down_bias="mlp.dense_4h_to_h.bias",
        lora=(
            *("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
            *("up_proj", "down_proj"),
        ),
        ignored_suffixes=("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
    ),
}


def find_architecture(config: dict[str, Any], folder: Path) -> Architecture:
    """Return the architecture of a model, from its raw `config.json`.

    Raises `RequestError` naming what was found if the family, or a variant of it, cannot be
    carved. `folder` is where its weights may lie.
    """
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        named = ", ".join(config.get("architectures") or []) or "no architecture named"
        raise RequestError(
            f"cannot carve a model of type {model_type!r} ({named}).{reason(config, folder)} "
            f"Supported model types: {', '.join(sorted(ARCHITECTURES))}."
        )
    if config.get("mlp_bias"):
        raise RequestError(
            "cannot carve an FFN with biases (mlp_bias is true): the experts have none. "
            "Use a checkpoint without FFN biases."
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
    return ARCHITECTURES[model_type]


def architecture_of(config: PreTrainedConfig) -> Architecture | None:
    """Return the architecture of a dense or a carved model; None if it is neither."""
    for arch in ARCHITECTURES.values():
        if config.model_type in (arch.dense_config.model_type, arch.cmoe_config.model_type):
            return arch
    return None


def reason(config: dict[str, Any], folder: Path) -> str:
    """Return what is known of a model that cannot be carved."""
    if str(config.get("model_type")).startswith("cmoe_"):
        return " It is carved already."
    for part, inner in config.items():
        if isinstance(inner, dict) and inner.get("model_type") in ARCHITECTURES:
            return (
                f" It has a {inner['model_type']} inside ({part}) beside other parts: save the "
                "language model by itself, and carve that."
            )
    found = []
    with suppress(RequestError):  # a Hub model is not there yet
        for name, tensor in read_headers(folder).items():
            layer, _, part = name.partition(".0.")
            if part and layer and len(tensor.shape) > 1 and not re.search("att|norm", part):
                found.append(f"{part.removesuffix('.weight')} {tuple(tensor.shape)}")
    if not found:
        return ""
    return (
        f" The FFN of its first layer has {', '.join(found[:8])}: if that is a gate, an up and a "
        "down projection, or the last two with biases, an entry in "
        "conversion/source/architectures.py would do: see CONTRIBUTING.md."
    )
