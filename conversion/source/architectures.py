# SPDX-License-Identifier: Apache-2.0
"""How each model family names its parts: one row per family, no code.

CONTRIBUTING.md says how to add a row.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.gpt_neox import modeling_gpt_neox as gpt_neox
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.olmoe import modeling_olmoe as olmoe
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

import cmoe_hf

from ..errors import RequestError
from .stored import read_headers


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A dense family that can be carved, and the CMoE classes it becomes."""

    dense_config: type[PreTrainedConfig]
    dense_model: type[PreTrainedModel]
    decoder_layer: type[nn.Module]
    """Its `mlp` is the FFN; called with hidden states, positions and position embeddings."""
    rotary_embedding: type[nn.Module]
    cmoe_config: type[cmoe_hf.CMoEConfig]
    cmoe_model: type[PreTrainedModel]
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
    """In what its decoder differs from Llama's, by the names in `share.needs`; None if nobody has
    said, so that its carved models cannot become another architecture."""
    driver: str = "pipeline"
    """The room of `carve` that walks its layers."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Beginnings of tensor names in checkpoints, and those of the CMoE classes."""
    ignored_suffixes: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Tensors of old checkpoints that are recomputed and not stored again."""

    def carved_name(self, name: str) -> str:
        """What a tensor of the checkpoint is called in the carved one."""
        for dense, carved in self.renamed.items():
            if name.startswith(dense):
                return carved + name.removeprefix(dense)
        return name

    def carved_layer(self, index: int) -> str:
        """What the names of a layer's tensors begin with in the carved checkpoint."""
        return self.carved_name(self.layer_prefix.format(index))


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        dense_config=llama.LlamaConfig,
        dense_model=llama.LlamaForCausalLM,
        decoder_layer=llama.LlamaDecoderLayer,
        rotary_embedding=llama.LlamaRotaryEmbedding,
        cmoe_config=cmoe_hf.CMoELlamaConfig,
        cmoe_model=cmoe_hf.CMoELlamaForCausalLM,
        differs=(),
    ),
    "mistral": Architecture(
        dense_config=mistral.MistralConfig,
        dense_model=mistral.MistralForCausalLM,
        decoder_layer=mistral.MistralDecoderLayer,
        rotary_embedding=mistral.MistralRotaryEmbedding,
        cmoe_config=cmoe_hf.CMoEMistralConfig,
        cmoe_model=cmoe_hf.CMoEMistralForCausalLM,
        differs=(),
    ),
    "qwen2": Architecture(
        dense_config=qwen2.Qwen2Config,
        dense_model=qwen2.Qwen2ForCausalLM,
        decoder_layer=qwen2.Qwen2DecoderLayer,
        rotary_embedding=qwen2.Qwen2RotaryEmbedding,
        cmoe_config=cmoe_hf.CMoEQwen2Config,
        cmoe_model=cmoe_hf.CMoEQwen2ForCausalLM,
        differs=("biases",),
    ),
    "qwen3": Architecture(
        dense_config=qwen3.Qwen3Config,
        dense_model=qwen3.Qwen3ForCausalLM,
        decoder_layer=qwen3.Qwen3DecoderLayer,
        rotary_embedding=qwen3.Qwen3RotaryEmbedding,
        cmoe_config=cmoe_hf.CMoEQwen3Config,
        cmoe_model=cmoe_hf.CMoEQwen3ForCausalLM,
        differs=("norms",),
    ),
    "qwen3_moe": Architecture(
        dense_config=qwen3_moe.Qwen3MoeConfig,
        dense_model=qwen3_moe.Qwen3MoeForCausalLM,
        decoder_layer=qwen3_moe.Qwen3MoeDecoderLayer,
        rotary_embedding=qwen3_moe.Qwen3MoeRotaryEmbedding,
        cmoe_config=cmoe_hf.CMoEQwen3MoeConfig,
        cmoe_model=cmoe_hf.CMoEQwen3MoeForCausalLM,
        driver="hierarchy",
        router="mlp.gate.weight",
        gate="gate_proj.weight",
        up="up_proj.weight",
        down="down_proj.weight",
        expert_width="moe_intermediate_size",
    ),
    "olmoe": Architecture(
        dense_config=olmoe.OlmoeConfig,
        dense_model=olmoe.OlmoeForCausalLM,
        decoder_layer=olmoe.OlmoeDecoderLayer,
        rotary_embedding=olmoe.OlmoeRotaryEmbedding,
        cmoe_config=cmoe_hf.CMoEOlmoeConfig,
        cmoe_model=cmoe_hf.CMoEOlmoeForCausalLM,
        driver="hierarchy",
        router="mlp.gate.weight",
        gate="gate_proj.weight",
        up="up_proj.weight",
        down="down_proj.weight",
    ),
    "gpt_neox": Architecture(
        dense_config=gpt_neox.GPTNeoXConfig,
        dense_model=gpt_neox.GPTNeoXForCausalLM,
        decoder_layer=gpt_neox.GPTNeoXLayer,
        rotary_embedding=gpt_neox.GPTNeoXRotaryEmbedding,
        cmoe_config=cmoe_hf.CMoEGPTNeoXConfig,
        cmoe_model=cmoe_hf.CMoEGPTNeoXForCausalLM,
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
        renamed={
            "gpt_neox.embed_in.": "model.embed_tokens.",
            "gpt_neox.final_layer_norm.": "model.norm.",
            "gpt_neox.": "model.",
            "embed_out.": "lm_head.",
        },
        ignored_suffixes=(
            "rotary_emb.inv_freq",
            "attention.bias",
            "attention.masked_bias",
        ),
    ),
}


def find_architecture(config: dict[str, Any], folder: Path) -> Architecture:
    """The row of a model, from its raw `config.json`.

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
    """The row of a dense or a carved model; None if it is neither."""
    for row in ARCHITECTURES.values():
        if config.model_type in (row.dense_config.model_type, row.cmoe_config.model_type):
            return row
    return None


def reason(config: dict[str, Any], folder: Path) -> str:
    """What is known of a model that cannot be carved."""
    if str(config.get("model_type")).startswith("cmoe_"):
        return " It is carved already."
    for part, inner in config.items():
        if isinstance(inner, dict) and inner.get("model_type") in ARCHITECTURES:
            return (
                f" It has a {inner['model_type']} inside ({part}) beside other parts: save the "
                "language model by itself, and carve that."
            )
    parts = ffn_parts(folder)
    if not parts:
        return ""
    return (
        f" The FFN of its first layer has {', '.join(parts)}: if that is a gate, an up and a down "
        "projection, or the last two with biases, a row in conversion/source/architectures.py "
        "would do: see CONTRIBUTING.md."
    )


def ffn_parts(folder: Path) -> list[str]:
    """Names and shapes of the matrices of the first layer that are neither attention nor norm."""
    try:
        stored = read_headers(folder)
    except RequestError:  # a Hub model is not there yet
        return []
    found = []
    for name, tensor in stored.items():
        layer, _, part = name.partition(".0.")
        if part and layer and len(tensor.shape) > 1 and not re.search("att|norm", part):
            found.append(f"{part.removesuffix('.weight')} {tuple(tensor.shape)}")
    return found[:8]
