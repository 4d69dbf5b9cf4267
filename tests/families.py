# SPDX-License-Identifier: Apache-2.0
"""Pico configurations of every family that can be carved."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

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
    "pythia": (GPTNeoXConfig, {"tie_word_embeddings": False}),
    "gpt-neox-sequential": (GPTNeoXConfig, {"use_parallel_residual": False}),
}
"""What distinguishes the checkpoints that people bring."""
RELATIVES = {"llama-3", "tinyllama", "mistral", "qwen2-sliding", "olmoe", "gpt-neox-sequential"}
"""They share classes with another of the families."""


def relatives_last(cases: Iterable[Any]) -> list[Any]:
    """Families, or tuples that begin with one, as parameters: `RELATIVES` in `make thorough`."""
    thorough = [pytest.mark.thorough]
    families = [(case if isinstance(case, str) else case[0], case) for case in cases]
    return [
        pytest.param(case, marks=thorough if family in RELATIVES else [])
        for family, case in families
    ]


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
    kind, own = FAMILIES[family]
    return kind(**{**fields, **own, **changes})
