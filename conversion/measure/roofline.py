# SPDX-License-Identifier: Apache-2.0
"""The least time that a machine could take: bytes over bandwidth, or operations over arithmetic.

Shape suffixes: T tokens, H hidden size, N routed experts, K active experts.
"""

from dataclasses import dataclass
from functools import cache
from typing import Self

import torch
from transformers import PreTrainedModel

from cmoe_hf.modeling_cmoe import CMoESparseMoeBlock

from ..device import best_seconds


@dataclass(frozen=True)
class Work:
    """What a computation needs at least."""

    bytes: float
    """Read or written at least once: weights, inputs and outputs, and the cache."""
    operations: float
    """Multiplications and additions."""

    def __add__(self, other: Self) -> Self:
        return type(self)(self.bytes + other.bytes, self.operations + other.operations)


@dataclass(frozen=True)
class Rates:
    """What a device can do in a second, at the precision of the models."""

    bytes: float
    operations: float

    def seconds(self, work: Work) -> float:
        """Return a lower bound for some work (Williams et al., 2009)."""
        return max(work.bytes / self.bytes, work.operations / self.operations)


@cache
def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Return the best bandwidth and arithmetic of plain matrix products on this device."""
    on_cpu = device.type == "cpu"
    side = 1024 if on_cpu else 8192
    # Several times larger than the caches.
    long_QH = torch.randn(2**13, 2**13 if on_cpu else 2**15, device=device, dtype=dtype)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    vector_H = torch.randn(long_QH.shape[1], device=device, dtype=dtype)
    read = min(
        best_seconds(lambda: long_QH @ vector_H, device),
        best_seconds(lambda: long_QH.view(torch.int32).sum(dtype=torch.int32), device),
    )
    product = best_seconds(lambda: left @ right, device)
    return Rates(long_QH.numel() * long_QH.element_size() / read, 2 * side**3 / product)


def ffn_work(block: torch.nn.Module, tokens: int, experts_hit: float) -> Work:
    """Return that of one FFN over `tokens` tokens that run `experts_hit` different experts."""
    weight = next(block.parameters())
    read = run = float(sum(parameter.numel() for parameter in block.parameters()))
    if isinstance(block, CMoESparseMoeBlock):
        experts = block.experts.num_experts
        expert = sum(parameter.numel() for parameter in block.experts.parameters()) / experts
        read -= expert * (experts - experts_hit)
        run -= expert * (experts - block.gate.top_k)
    vectors = 2 * tokens * weight.shape[-1]
    return Work(weight.element_size() * (read + vectors), 2 * tokens * run)


def model_work(
    model: PreTrainedModel,
    blocks: list[torch.nn.Module],
    experts_hit: list[float],
    *,
    batch: int,
    tokens: int,
    context: int,
) -> Work:
    """Return that of a model over `tokens` new tokens behind `context`, in `batch` sequences.

    The head runs for the last token of each sequence only.
    """
    config, size = model.config, model.dtype.itemsize
    head = model.get_output_embeddings().weight
    embedding = model.get_input_embeddings().weight
    apart = {id(p) for block in blocks for p in block.parameters()} | {id(embedding), id(head)}
    attention = sum(p.numel() for p in model.parameters() if id(p) not in apart)
    rows = batch * tokens
    work = Work(size * attention, 2 * rows * attention)
    work += Work(size * head.numel(), 2 * batch * head.numel())
    for block, hit in zip(blocks, experts_hit, strict=True):
        work += ffn_work(block, rows, hit)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    seen = context + (tokens + 1) / 2  # by a token, on average
    key_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    keys = 2 * config.num_hidden_layers * key_heads * width
    queries = 2 * config.num_hidden_layers * config.num_attention_heads * width
    return work + Work(size * batch * (context + tokens) * keys, 2 * rows * seen * queries)
