# SPDX-License-Identifier: Apache-2.0
"""Pico configurations of every family that can be carved."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import (
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama-2": (LlamaConfig, {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama-3": (
        LlamaConfig,
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": ROPE_LLAMA3},
    ),
    "tinyllama": (LlamaConfig, {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "mistral": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral-sliding": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": 16}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2-sliding": (
        Qwen2Config,
        {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 1,
        },
    ),
    "qwen3": (Qwen3Config, {"num_key_value_heads": 2, "head_dim": 32}),
    "qwen3-moe": (
        Qwen3MoeConfig,
        {
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "intermediate_size": 160,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": (OlmoeConfig, {"num_experts": 4, "num_experts_per_tok": 2}),
    "mixtral": (
        MixtralConfig,
        {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "pythia": (GPTNeoXConfig, {"tie_word_embeddings": False}),
    "gpt-neox-sequential": (GPTNeoXConfig, {"use_parallel_residual": False}),
}
"""What distinguishes the checkpoints that people bring."""
SHORT_WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
DECODERS: dict[str, dict[str, Any]] = {
    "arcee": {},
    "bloom": {},
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.25, **SHORT_WINDOW},
    "exaone4": SHORT_WINDOW,
    "falcon": {"new_decoder_architecture": False, "num_kv_heads": 1},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, **SHORT_WINDOW},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, **SHORT_WINDOW},
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 0,
        **SHORT_WINDOW,
    },
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "gpt2": {"n_inner": 96},
    "gptj": {"n_inner": 96, "rotary_dim": 8},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    },
    "lfm2": {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]},
    "ministral": {"head_dim": 16, **SHORT_WINDOW},
    "nemotron": {},
    "olmo2": {},
    "olmo3": SHORT_WINDOW,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi": {},
    "phi3": {"partial_rotary_factor": 0.5},
    "qwen3_5_text": {
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 8,  # its projections are wider than the FFN, and found first
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {"use_qkv_bias": True},
    "starcoder2": {},
}
"""Pico configurations of other families, by their `model_type`: what they do not share."""
SINCE: dict[str, str] = {}
"""The first transformers in which one of them works, where that is not the lowest supported."""
RELATIVES = {"llama-3", "tinyllama", "mistral", "qwen2-sliding", "olmoe", "mixtral"}
RELATIVES |= {"gpt-neox-sequential"}
"""They share classes with another of the families."""


def relatives_last(cases: Iterable[Any]) -> list[Any]:
    """Families, or tuples that begin with one, as parameters: `RELATIVES` in `make thorough`."""
    thorough = [pytest.mark.thorough]
    families = [(case if isinstance(case, str) else case[0], case) for case in cases]
    return [
        pytest.param(case, marks=thorough if family in RELATIVES else [])
        for family, case in families
    ]


MISSING = {
    name: since
    for name, since in SINCE.items()
    if [*map(int, since.split("."))] > [*map(int, transformers.__version__.split(".")[:2])]
}
"""What this transformers lacks of them."""


def decoders() -> list[Any]:
    """`DECODERS` as parameters; those that this transformers lacks are skipped."""
    skipped = {
        name: [pytest.mark.skip(f"needs transformers {since}")] for name, since in MISSING.items()
    }
    return [pytest.param(name, marks=skipped.get(name, [])) for name in DECODERS]


SHORT = Path(__file__).parent / "fixtures" / "short.txt"
"""The first 4,000 characters of the held-out text."""


def pico_config(family: str = "llama-2", **changes: object) -> PreTrainedConfig:
    """Two layers, hidden 64, FFN 96: divisible by 4, 6, 8, 12."""
    fields = {
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    if family in FAMILIES:
        kind, own = FAMILIES[family]
        return kind(**{**fields, **own, **changes})
    kind, own = CONFIG_MAPPING[family], DECODERS.get(family, {})
    known = {*kind.attribute_map, *(field.name for field in dataclasses.fields(kind))}
    common = {**fields, "num_key_value_heads": 2, "original_max_position_embeddings": 128}
    return kind(**{name: it for name, it in common.items() if name in known} | own | changes)


def block_config(
    kind: Any, hidden: int, width: int, experts: int, top_k: int, shared: int, **options: Any
) -> PreTrainedConfig:
    """Return the configuration of a carved model of one layer, by the widths of its block."""
    return kind(
        hidden_size=hidden,
        intermediate_size=(shared + experts) * width,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=shared * width,
        num_experts=experts,
        num_experts_per_tok=top_k,
        num_hidden_layers=1,
        **options,
    )
