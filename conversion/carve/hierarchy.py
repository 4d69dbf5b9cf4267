# SPDX-License-Identifier: Apache-2.0
"""The algorithm on a MoE: each of its experts, the parents, is carved (paper, eq. 10).

What the paper leaves open is decided here; docs/families.md says why and what was measured:

* A parent is profiled on the tokens that the source's router sends to it, on the hidden states
  behind the carved layers, and by its contributions: h is multiplied by the parent's weight.
* The parent's weight multiplies its parts, so that all of them together are the parent.
* Parents that too few tokens reach stay whole: all of their experts run.
* Each parent is refitted to its own output.

Shape suffixes: T tokens, U tokens of one parent, H hidden size, F width of a parent, P parents of a
token, N experts carved from one parent, M neurons of such an expert, X such experts of all parents.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cmoe_hf import CMoEConfig, CMoEHierarchicalConfig
from cmoe_hf.modeling_cmoe import CMoEHierarchicalRouter

from ..device import Stopwatch
from ..source.checkpoint import Source
from ..source.library import AttentionHalf
from .decoder import Storage, Streams, attend, sparse_output, with_totals
from .layer import (
    FFN,
    Profile,
    all_finite,
    build_router,
    divide,
    overflowed,
    relative_error,
    take_ffn,
)
from .partition import Partition
from .profile import activation_marks, activations
from .recipe import Recipe
from .refit import refit_down, ridge_for
from .router import log_energy_router, output_energies
from .shape import parent_config

FEWEST = 1 / 3
"""Tokens a neuron of a parent. With fewer, static pruning was as good as routing, measured."""


@dataclass
class Parent:
    """One expert of the source while it is carved."""

    ffn: FFN
    token_U: torch.Tensor
    """The tokens that it is picked for, int64."""
    slot_U: torch.Tensor
    """Which of the token's parents it is, int64."""
    weight_U: torch.Tensor
    """Its weight for each of them."""

    def profile(self, x_TH: torch.Tensor, k: int, *, cosine: bool) -> Profile:
        """Its inputs, weighted hidden activations and marks."""
        x_UH = x_TH[self.token_U]
        products = self.ffn.products(x_UH)
        h_UF = activations(*products, self.ffn.act)
        signal_UF = self.ffn.cosine_hidden(x_UH, *products) if cosine else h_UF
        marks_UK = activation_marks(signal_UF, k).cpu()
        finite = all_finite(h_UF, marks_UK)
        return Profile(x_UH, h_UF * self.weight_U[:, None], marks_UK, finite)


@dataclass
class CarvedParent:
    """What is known of a parent before its experts are routed."""

    partition: Partition
    router: dict[str, torch.Tensor]
    kept: bool


def carve_moe(
    source: Source,
    streams: Streams,
    config: CMoEConfig,
    recipe: Recipe,
    *,
    first: int = 0,
    k_act: int,
    storage: Storage,
) -> Iterator[tuple[int, dict[str, torch.Tensor], dict[str, Any]]]:
    """As `pipeline.carve_model`, for a MoE."""
    row, router = source.architecture, source.architecture.router
    assert router is not None and isinstance(config, CMoEHierarchicalConfig)  # so says the row
    inner = parent_config(config, recipe)
    hidden_TH = streams.carved_WLH.flatten(0, 1)
    attention = AttentionHalf(row, source.config, streams.length, storage.device)
    x_TH = storage.empty("inputs", streams.tokens, config.hidden_size)
    for index in range(first, config.num_hidden_layers):
        clock = Stopwatch()
        with clock("read"):
            rest = source.read_layer(index, without_experts=True)
            layer = {
                name: tensor.to(storage.device, torch.float32) for name, tensor in rest.items()
            }
            router_weight = layer.pop(router)
            attention.load(index, layer)
        with clock("forward"):
            for tokens, x_BH in attend(attention, streams.carved_WLH):
                x_TH[tokens] = x_BH
        if not bool(torch.isfinite(x_TH).all()):
            raise overflowed(index)
        gate = CMoEHierarchicalRouter(config).to(storage.device)
        gate.parent_weight.copy_(router_weight)
        tensors, figures, y_TH = carve_parents(
            source, index, gate, x_TH, inner, recipe, clock, k_act=k_act
        )
        hidden_TH += y_TH
        attention.release()
        del layer, y_TH
        # The dense down projection ran for all tokens: it is no sample.
        figures["seconds"] = with_totals(clock.seconds, 1)
        rest["mlp.gate.parent_weight"] = rest.pop(router)
        tensors = {row.carved_layer(index) + name: it for name, it in (rest | tensors).items()}
        yield index, tensors, figures
        del tensors, rest


def carve_parents(
    source: Source,
    index: int,
    gate: CMoEHierarchicalRouter,
    x_TH: torch.Tensor,
    inner: CMoEConfig,
    recipe: Recipe,
    clock: Stopwatch,
    *,
    k_act: int,
) -> tuple[dict[str, torch.Tensor], dict[str, Any], torch.Tensor]:
    """Carve the parents of one layer: the tensors, the figures and the output (T, H).

    A parent's weights are read twice, so that one parent at a time is in memory as float32:
    which of its experts run may depend on all parents.
    """
    with clock("forward"):
        weight_TP, parent_TP = gate.parents(x_TH)
    parents: list[CarvedParent] = []
    for number in range(len(gate.parent_weight)):
        with clock("read"):
            parent = read_parent(source, index, number, inner, weight_TP, parent_TP)
        parents.append(divide_parent(index, parent, x_TH, inner, recipe, clock, k_act=k_act))
    with clock("router"):
        load_router(gate, parents, parent.ffn)
        index_TX = gate(x_TH).index_TK
        run_TX = torch.zeros(len(x_TH), len(gate.scale), dtype=torch.bool, device=x_TH.device)
        run_TX.scatter_(1, index_TX, True)
    y_TH, dense_TH = torch.zeros_like(x_TH), torch.zeros_like(x_TH)
    stored: dict[str, list[torch.Tensor]] = {}
    for number, carved in enumerate(parents):
        with clock("read"):
            parent = read_parent(source, index, number, inner, weight_TP, parent_TP)
        own_X = slice(number * gate.per_parent, (number + 1) * gate.per_parent)
        run_UN = run_TX[parent.token_U, own_X]
        down_HF = finish_parent(parent, carved, x_TH, run_UN, recipe, clock, y_TH, dense_TH)
        with clock("slicing"):
            for name, tensor in parent_tensors(parent.ffn, carved.partition, down_HF).items():
                stored.setdefault(name, []).append(tensor.to(parent.ffn.stored_dtype).cpu())
    if not bool(torch.isfinite(dense_TH).all()):  # of a parent that stays whole
        raise overflowed(index)
    with clock("slicing"):
        tensors = {name: torch.cat(parts) for name, parts in stored.items()}
    for name, tensor in gate.state_dict().items():
        if name != "parent_weight":
            tensors[f"mlp.gate.{name}"] = tensor.cpu()
    figures = {
        "relative_output_error": relative_error(y_TH, dense_TH),
        "tokens_of_parents": torch.bincount(parent_TP.flatten(), minlength=len(parents)).tolist(),
        "kept_parents": gate.kept_parents,
        "expert_sizes": [inner.moe_intermediate_size] * len(gate.scale),
        "expert_loads": run_TX.float().mean(dim=0).tolist(),
    }
    return tensors, figures, y_TH


def finish_parent(
    parent: Parent,
    carved: CarvedParent,
    x_TH: torch.Tensor,
    run_UN: torch.Tensor,
    recipe: Recipe,
    clock: Stopwatch,
    y_TH: torch.Tensor,
    dense_TH: torch.Tensor,
) -> torch.Tensor:
    """The refitted down projection (H, F) under the routing `run_UN`.

    Adds what the parent writes, carved and dense, to `y_TH` and `dense_TH`.
    """
    ffn, down_HF = parent.ffn, parent.ffn.down_HF
    with clock("forward_again"):
        h_UF = ffn.hidden(x_TH[parent.token_U]) * parent.weight_U[:, None]
    with clock("dense_down_sample"):
        wanted_UH = h_UF @ down_HF.T
    with clock("refit"):
        run_UN = run_UN | carved.kept
        if recipe.refit and not carved.kept:
            ridge = ridge_for(len(h_UF), ffn.width, recipe.refit_ridge)
            problem = (h_UF, carved.partition, run_UN, wanted_UH, down_HF)
            down_HF = ffn.rounded(refit_down(*problem, ridge=ridge))
    with clock("carved_down"):
        y_UH = sparse_output(ffn, down_HF, carved.partition, run_UN, wanted_UH, h_UF)
        y_TH.index_add_(0, parent.token_U, y_UH)
        dense_TH.index_add_(0, parent.token_U, wanted_UH)
    return down_HF


def read_parent(
    source: Source,
    index: int,
    number: int,
    inner: CMoEConfig,
    weight_TP: torch.Tensor,
    parent_TP: torch.Tensor,
) -> Parent:
    """One parent in float32, and the tokens that the source's router sends to it."""
    stored = source.read_expert(index, number)
    ffn, _ = take_ffn(source.architecture, stored, inner, weight_TP.device)
    token_U, slot_U = torch.where(parent_TP == number)
    return Parent(ffn, token_U, slot_U, weight_TP[token_U, slot_U])


def divide_parent(
    index: int,
    parent: Parent,
    x_TH: torch.Tensor,
    inner: CMoEConfig,
    recipe: Recipe,
    clock: Stopwatch,
    *,
    k_act: int,
) -> CarvedParent:
    """Partition and router of one parent; of one that stays whole, any."""
    ffn, experts = parent.ffn, inner.num_experts
    if len(parent.token_U) < FEWEST * ffn.width:
        everything_F = torch.arange(ffn.width)
        shared_S, routed_R = everything_F.tensor_split([inner.shared_expert_intermediate_size])
        parts = Partition(shared_S, routed_R.view(experts, -1), routed_R.view(experts, -1)[:, 0], 0)
        return CarvedParent(parts, {}, kept=True)
    with clock("forward"):
        profile = parent.profile(x_TH, k_act, cosine=recipe.cosine_profile)
    if not profile.is_finite:
        raise overflowed(index)
    with clock("partition"):
        parts = divide(ffn, profile, inner, recipe)
    with clock("router"):
        if recipe.competition == "token":
            energy_UN = output_energies(profile.h_TF, ffn.down_HF, parts.experts_NM)
            weight_U1 = parent.weight_U[:, None].square()  # of an unlikely parent perhaps 0
            energy_UN = energy_UN / weight_U1.clamp_min(torch.finfo(torch.float32).tiny)
            router = log_energy_router(profile.x_TH, energy_UN, ridge=recipe.router_ridge)
        else:
            router = build_router(ffn, profile, parts, inner, recipe)
    return CarvedParent(parts, router, kept=False)


def load_router(gate: CMoEHierarchicalRouter, parents: list[CarvedParent], ffn: FFN) -> None:
    """Give the router what was found for each parent, rounded as it will be stored."""
    gate.kept_parents = [number for number, carved in enumerate(parents) if carved.kept]
    for name, tensor in gate.state_dict().items():
        if name == "parent_weight":
            continue
        rows = tensor.unflatten(0, (len(parents), -1)).zero_()
        for row, carved in zip(rows, parents, strict=True):
            if name in carved.router:
                row.copy_(ffn.rounded(carved.router[name]))


def parent_tensors(ffn: FFN, parts: Partition, down_HF: torch.Tensor) -> dict[str, torch.Tensor]:
    """The packed tensors of one parent."""
    assert ffn.gate_FH is not None  # of every family so far
    shared_S, experts_NM = parts.shared_S, parts.experts_NM
    packed = [ffn.gate_FH[experts_NM], ffn.up_FH[experts_NM]]
    tensors = {
        "mlp.experts.gate_up_proj": torch.cat(packed, dim=1),
        "mlp.experts.down_proj": down_HF.T[experts_NM].transpose(1, 2),
    }
    if len(shared_S):
        packed = [ffn.gate_FH[shared_S], ffn.up_FH[shared_S]]
        tensors["mlp.shared_experts.gate_up_proj"] = torch.cat(packed)[None]
        tensors["mlp.shared_experts.down_proj"] = down_HF[None, :, shared_S]
    return tensors
