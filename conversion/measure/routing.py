# SPDX-License-Identifier: Apache-2.0
"""Watch, or replace, the routers of a carved model while it runs.

Shape suffixes: T tokens, H hidden size, N routed experts, K active experts, M neurons of an expert,
Q = 2M.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from cmoe_hf.modeling_cmoe import CMoEHierarchicalBlock, CMoERouter, CMoESparseMoeBlock

from ..carve.router import agreement, always_on_mask
from ..errors import RequestError
from ..source.stored import read_headers, read_json, read_tensors

HIERARCHICAL = (
    "the model is a carved MoE, of which only perplexity and routing can be measured yet: use "
    "`cmoe evaluate`."
)
RoutedBlock = CMoESparseMoeBlock | CMoEHierarchicalBlock


def sparse_blocks(model: PreTrainedModel) -> list[CMoESparseMoeBlock]:
    """Return the carved FFNs of a model in the order of its layers; none for a dense model.

    Raises `RequestError` for a hierarchical model.
    """
    if any(isinstance(block, CMoEHierarchicalBlock) for block in model.modules()):
        raise RequestError(HIERARCHICAL)
    return [block for block in model.modules() if isinstance(block, CMoESparseMoeBlock)]


def check_flat(folder: Path) -> None:
    """Raise `RequestError` for a hierarchical model, before its weights are loaded."""
    if "num_parents" in read_json(folder / "config.json"):
        raise RequestError(HIERARCHICAL)


def check_dense(model: PreTrainedModel, baseline: str | Path) -> None:
    """Raise `RequestError` for a baseline that is carved."""
    if sparse_blocks(model):
        raise RequestError(f"the baseline {baseline} is carved itself: give the dense model.")


def routing_blocks(model: PreTrainedModel) -> list[RoutedBlock]:
    """Return the carved FFNs and MoEs that choose something, in the order of the layers."""
    blocks = [block for block in model.modules() if isinstance(block, RoutedBlock)]
    return [block for block in blocks if block.gate.top_k > 0]


def active_routers(model: nn.Module) -> list[CMoERouter]:
    """Return the routers that choose something, in the order of the layers."""
    routers = [module for module in model.modules() if isinstance(module, CMoERouter)]
    return [router for router in routers if router.top_k > 0]


def always_on(router: CMoERouter) -> torch.Tensor:
    """Return which experts of a router run for every token, (N,) bool."""
    return always_on_mask(router.balance_bias, router.always_on)


def stored_always_on(folder: Path, config: PreTrainedConfig) -> list[list[int]] | None:
    """Return the `always_on_experts` of a carved model; from its biases if it does not say them."""
    listed: list[list[int]] | None = getattr(config, "always_on_experts", None)
    if listed is not None:
        return listed
    stored = read_headers(folder)
    listed = [[] for _ in range(config.num_hidden_layers)]
    biases = {name: it for name, it in stored.items() if name.endswith(".gate.balance_bias")}
    for name, bias_N in read_tensors(biases):
        listed[layer_number(name)] = always_on_mask(bias_N, None).nonzero().flatten().tolist()
    return listed if any(listed) else None


def layer_number(name: str) -> int:
    """Return the layer of a carved model's tensor, from its name such as `model.layers.3.mlp`."""
    return int(next(part for part in name.split(".") if part.isdecimal()))


@contextmanager
def collected(
    modules: Sequence[nn.Module], take: Callable[[Any, Any, Any], Any]
) -> Iterator[list[list[Any]]]:
    """Collect what `take(module, inputs, output)` returns at every call of each module."""
    found: list[list[Any]] = [[] for _ in modules]

    def hook(kept: list[Any]) -> Callable[..., None]:
        return lambda *call: kept.append(take(*call))

    with ExitStack() as stack:
        for module, kept in zip(modules, found, strict=True):
            stack.callback(module.register_forward_hook(hook(kept)).remove)
        yield found


@contextmanager
def count_loads(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Count how many tokens choose each expert, (N,) int64 for each routing layer in order."""
    gates = active_routers(model)
    loads = [torch.zeros_like(gate.balance_bias, dtype=torch.int64) for gate in gates]
    by_gate = dict(zip(gates, loads, strict=True))

    def count(gate: CMoERouter, inputs: Any, output: Any) -> None:
        by_gate[gate].add_(torch.bincount(output[2].flatten(), minlength=len(by_gate[gate])))

    with collected(gates, count):
        yield loads


def imbalance(load_N: torch.Tensor, always_on_N: torch.Tensor) -> float:
    """Return the coefficient of variation (standard deviation over mean) of one layer's loads.

    Experts that are always on do not count. 0 is perfect balance.
    """
    load_N = load_N[~always_on_N.to(load_N.device)].double()
    if len(load_N) < 2 or load_N.sum() == 0:
        return 0.0
    return (load_N.std(correction=0) / load_N.mean()).item()


def watch_router(block: RoutedBlock) -> AbstractContextManager[list[list[float]]]:
    """Collect, batch by batch, how often the block's own router picks the oracle's experts."""

    def compare(gate: CMoERouter, inputs: tuple[torch.Tensor], output: Any) -> float:
        oracle_TK = gate.pick(routed_mass(block, inputs[0]), inputs[0])
        _, running = gate.choice
        return agreement(output[2].view(-1, running), oracle_TK.view(-1, running))

    return collected([block.gate], compare)


@contextmanager
def replace_router(block: RoutedBlock, router: str, seed: int) -> Iterator[None]:
    """Let the oracle, or chance, choose the experts of a block; gate weights follow the choice."""
    generator = torch.Generator().manual_seed(seed)

    def selection_score(
        probability: torch.Tensor, index: torch.Tensor | None, x_TH: torch.Tensor
    ) -> torch.Tensor:
        if router == "oracle":
            value_TN = routed_mass(block, x_TH)
        else:
            drawn_TN = torch.rand(len(x_TH), block.experts.num_experts, generator=generator)
            value_TN = drawn_TN.to(x_TH.device)
        return value_TN if index is None else value_TN.gather(1, index.flatten(1)).view_as(index)

    gate: Any = block.gate
    gate.selection_score = selection_score
    try:
        yield
    finally:
        del gate.selection_score


def routed_mass(block: RoutedBlock, x_TH: torch.Tensor) -> torch.Tensor:
    """Compute every routed expert; return its sum of |h| for every token, (T, N).

    In a carved MoE it is multiplied by the weight of the expert's parent.
    """
    experts = range(block.experts.num_experts)  # quantised weights cannot be iterated
    hidden = (block.experts.hidden(expert, x_TH) for expert in experts)
    mass_TN = torch.stack([h_TM.abs().float().sum(dim=1) for h_TM in hidden], dim=1)
    if isinstance(block, CMoEHierarchicalBlock):
        weight_TP, parent_TP = block.gate.parents(x_TH)
        weight_TQ = mass_TN.new_zeros(len(x_TH), len(block.gate.parent_weight))
        weight_TQ.scatter_(1, parent_TP, weight_TP.float())
        mass_TN = mass_TN * weight_TQ.repeat_interleave(block.gate.per_parent, dim=1)
    return mass_TN
