# SPDX-License-Identifier: Apache-2.0
"""Models of a known shape with random weights: for timing, where the weights do not matter."""

from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from ..carve.recipe import RECIPES
from ..carve.shape import Shape, carved_config
from ..errors import RequestError
from ..source.architectures import ARCHITECTURES, architecture_of

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "smollm2-360m": {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "tinyllama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-2-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
}
"""What is to be known of a model to time it with random weights."""


def shape_config(name: str, layers: int | None, shape: Shape) -> PreTrainedConfig:
    """Configuration of a carved model of a known dense one's sizes. Raises `RequestError`."""
    if name not in SHAPES:
        raise RequestError(f"there is no shape {name!r}; choose one of {', '.join(SHAPES)}.")
    dense = LlamaConfig(**SHAPES[name])
    if layers is not None:
        dense.num_hidden_layers = layers
    return carved_config(dense, ARCHITECTURES["llama"], shape, RECIPES["refined"])


def dense_twin(carved: PreTrainedConfig) -> PreTrainedConfig:
    """Configuration of the dense model of a carved one's shape."""
    arch = architecture_of(carved)
    assert arch is not None  # it is carved
    known = arch.dense_config().to_dict().keys() - {"model_type", "architectures"}
    return arch.dense_config(
        **{name: value for name, value in carved.to_dict().items() if name in known}
    )


def check_memory(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raises `RequestError` if a dense and a carved model of this shape would not fit."""
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    needed = 2 * parameters * dtype.itemsize
    free = psutil.virtual_memory().available
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    if needed > free:
        raise RequestError(
            f"two models of this shape need {needed / 1e9:.1f} GB of memory, but {free / 1e9:.1f} "
            "GB are free: lower --layers."
        )


def random_model(
    config: PreTrainedConfig, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """A model with random weights, made where it will run."""
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
