# SPDX-License-Identifier: Apache-2.0
"""Models of a known shape with random weights: for timing, where the weights do not matter."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..carve.recipe import RECIPES
from ..carve.shape import Shape, carved_config
from ..device import free_memory
from ..errors import RequestError, check_known
from ..source.architectures import dense_type, llama_architecture


def _shape(
    hidden: int, width: int, layers: int, heads: int, key_heads: int, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        **more,
    }


_SMOLLM2: dict[str, Any] = {"vocab_size": 49152, "tie_word_embeddings": True}
_LLAMA_3_2: dict[str, Any] = {"vocab_size": 128256, "tie_word_embeddings": True}
SHAPES = {
    "tiny": _shape(256, 1024, 3, 4, 2),
    "smollm2-135m": _shape(576, 1536, 30, 9, 3, **_SMOLLM2),
    "smollm2-360m": _shape(960, 2560, 32, 15, 5, **_SMOLLM2),
    "tinyllama-1.1b": _shape(2048, 5632, 22, 32, 4),
    "llama-3.2-1b": _shape(2048, 8192, 16, 32, 8, **_LLAMA_3_2),
    "llama-3.2-3b": _shape(3072, 8192, 28, 24, 8, **_LLAMA_3_2),
    "llama-2-7b": _shape(4096, 11008, 32, 32, 32),
    "llama-3-8b": _shape(4096, 14336, 32, 32, 8, vocab_size=128256),
    "llama-2-70b": _shape(8192, 28672, 80, 64, 8),
}
"""Fields of a `LlamaConfig` by the name of a known model; 32,000 is the default vocabulary."""


def shape_config(name: str, layers: int | None, shape: Shape) -> PreTrainedConfig:
    """Return the configuration of a carved model of a known one's sizes. Raise `RequestError`."""
    check_known("shape", name, SHAPES)
    dense = LlamaConfig(**SHAPES[name])
    if layers is not None:
        dense.num_hidden_layers = layers
    return carved_config(dense, llama_architecture(dense), shape, RECIPES["refined"])


def dense_twin(carved: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of the dense model of a carved one's shape."""
    dense, fields = CONFIG_MAPPING[dense_type(carved)], carved.to_dict()
    known = dense().to_dict().keys() - {"model_type", "architectures"}
    return dense(**{name: fields[name] for name in known & fields.keys()})


def random_carved(
    config: PreTrainedConfig, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """Return a carved model with random weights.

    Raises `RequestError` if it and a dense one beside it would not fit into memory.
    """
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    needed = 2 * parameters * dtype.itemsize
    free = free_memory(device)
    if needed > free:
        raise RequestError(
            f"two models of this shape need {needed / 1e9:.1f} GB of memory, but {free / 1e9:.1f} "
            "GB are free: lower --layers."
        )
    return random_model(config, device, dtype)


def random_model(
    config: PreTrainedConfig, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """Return a model with random weights, made where it will run."""
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
