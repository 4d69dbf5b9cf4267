# SPDX-License-Identifier: Apache-2.0
"""Watch, or replace, the routers of a carved model while it runs.

Shape suffixes: T tokens, H hidden size, N routed experts, K active experts, M neurons of an expert,
Q = 2M.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from cmoe_hf.modeling_cmoe import CMoERouter, CMoESparseMoeBlock

from .router import agreement, oracle_choice

PINNED = 1.0
"""A balance bias above this always wins: probabilities are below 1. Pinned experts have 2."""


def sparse_blocks(model: PreTrainedModel) -> list[CMoESparseMoeBlock]:
    """The carved FFNs of a model in the order of its layers; none for a dense model."""
    return [block for block in model.modules() if isinstance(block, CMoESparseMoeBlock)]


def active_routers(model: nn.Module) -> list[CMoERouter]:
    """The routers that choose something, in the order of the layers."""
    routers = [module for module in model.modules() if isinstance(module, CMoERouter)]
    return [router for router in routers if router.top_k > 0]


def is_biased(router: CMoERouter) -> bool:
    """Whether a balance bias other than that of a pinned expert has moved."""
    bias_N = router.balance_bias
    return bool(bias_N[bias_N <= PINNED].any())


@contextmanager
def without_bias(model: nn.Module) -> Iterator[None]:
    """Set the balance biases to zero for a while, but for those of pinned experts."""
    biases = [router.balance_bias for router in active_routers(model)]
    kept = [bias_N.clone() for bias_N in biases]
    for bias_N in biases:
        bias_N[bias_N <= PINNED] = 0
    try:
        yield
    finally:
        for bias_N, before_N in zip(biases, kept, strict=True):
            bias_N.copy_(before_N)


@contextmanager
def count_loads(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Count how many tokens choose each expert, (N,) int64 for each routing layer in order."""
    gates = active_routers(model)
    loads = [torch.zeros_like(gate.balance_bias, dtype=torch.int64) for gate in gates]

    def counter(load_N: torch.Tensor) -> Callable[..., None]:
        def count(gate: CMoERouter, inputs: tuple[torch.Tensor], output: Any) -> None:
            load_N.add_(torch.bincount(output[2].flatten(), minlength=len(load_N)))

        return count

    with ExitStack() as stack:
        for gate, load_N in zip(gates, loads, strict=True):
            stack.callback(gate.register_forward_hook(counter(load_N)).remove)
        yield loads


def imbalance(load_N: torch.Tensor, bias_N: torch.Tensor) -> float:
    """Coefficient of variation (standard deviation over mean) of the loads of one layer.

    Pinned experts always run and do not count. 0 is perfect balance.
    """
    load_N = load_N[bias_N.to(load_N.device) <= PINNED].double()
    if len(load_N) < 2 or load_N.sum() == 0:
        return 0.0
    return (load_N.std(correction=0) / load_N.mean()).item()


@contextmanager
def watch_router(block: CMoESparseMoeBlock) -> Iterator[list[float]]:
    """Collect, batch by batch, how often the block's own router picks the oracle's experts."""
    collected: list[float] = []

    def compare(gate: CMoERouter, inputs: tuple[torch.Tensor], output: Any) -> None:
        oracle_TK = oracle_choice(routed_mass(block, inputs[0]), gate.top_k)
        collected.append(agreement(output[2], oracle_TK))

    handle = block.gate.register_forward_hook(compare)
    try:
        yield collected
    finally:
        handle.remove()


@contextmanager
def replace_router(block: CMoESparseMoeBlock, router: str, seed: int) -> Iterator[None]:
    """Let the oracle, or chance, choose the experts of a block; gate weights follow the choice."""
    generator = torch.Generator().manual_seed(seed)
    choose: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "oracle": lambda x_TH: routed_mass(block, x_TH),
        "random": lambda x_TH: torch.rand(
            len(x_TH), block.experts.num_experts, generator=generator
        ).to(x_TH.device),
    }

    def override(gate: CMoERouter, inputs: tuple[torch.Tensor], output: Any) -> Any:
        score_TN, weight_TK, _ = output
        index_TK = choose[router](inputs[0]).topk(gate.top_k, dim=1).indices
        probability_TN = score_TN.softmax(dim=1, dtype=torch.float32)
        weight_TK = gate.weigh(probability_TN, index_TK)
        return score_TN, weight_TK.to(inputs[0].dtype), index_TK

    handle = block.gate.register_forward_hook(override)
    try:
        yield
    finally:
        handle.remove()


def routed_mass(block: CMoESparseMoeBlock, x_TH: torch.Tensor) -> torch.Tensor:
    """Sum of |h| of every routed expert for every token, (T, N): all of them are computed."""
    masses = []
    for expert in range(block.experts.num_experts):  # quantised weights cannot be iterated
        masses.append(block.experts.hidden(expert, x_TH).abs().float().sum(dim=1))
    return torch.stack(masses, dim=1)
