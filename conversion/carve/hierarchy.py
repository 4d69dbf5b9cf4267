# SPDX-License-Identifier: Apache-2.0
"""The algorithm on a MoE: each expert of the source is carved (paper, eq. 10).

The paper leaves some choices open; docs/families.md gives the reasons and what was measured:

* A source expert is profiled on the tokens that the source's router sends to it, on the hidden
  states after the carved layers, and by its contributions: h is multiplied by its weight.
* Its weight multiplies its parts, so that all of them together are the source expert.
* Source experts that too few tokens reach are kept whole: all of their parts run.
* Each source expert is refitted to its own output.

The model's configuration and tensors call the source experts parents.

Shape suffixes: T tokens, U tokens of one source expert, H hidden size, F its width, P source
experts of a token, N experts carved from one, X those of all.
"""

from typing import Any, NamedTuple

import torch

from cmoe_hf import CMoEHierarchicalConfig
from cmoe_hf.modeling_cmoe import CMoEHierarchicalRouter

from ..device import Stopwatch
from ..source.ffn import overflowed
from .decoder import Walk, attend, with_totals
from .layer import (
    FFN,
    Profile,
    build_router,
    divide,
    packed,
    relative_error,
    take_ffn,
)
from .partition import Partition
from .refit import Samples, reconstruct, ridge_for, sparse_output
from .router import log_energy_router, output_energies
from .shape import source_expert_config

FEWEST = 1 / 3
"""Tokens per neuron of a source expert. With fewer, static pruning was as good, measured."""


class SourceExpert(NamedTuple):
    """One expert of the source and the tokens that its router sends there."""

    ffn: FFN
    token_U: torch.Tensor
    """Indices of the tokens, int64."""
    weight_U: torch.Tensor
    """The router's weight for each of them."""
    x_UH: torch.Tensor
    """Their inputs."""


class CarvedExpert(NamedTuple):
    """A source expert divided, before its parts are routed."""

    partition: Partition
    router: dict[str, torch.Tensor]
    kept: bool
    """Whether it is kept whole."""


class MoEWalk(Walk):
    """Carve a MoE, whose experts are profiled and refitted one by one."""

    config: CMoEHierarchicalConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        self.inner = source_expert_config(self.config, self.recipe)
        hidden = self.config.hidden_size
        self.x_TH = self.storage.empty("inputs", self.streams.tokens, hidden)

    def carve(self, index: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Carve the experts of a layer; return tensors to store, and figures."""
        clock, router, device = Stopwatch(), self.arch.router, self.storage.device
        assert router is not None  # or it is no MoE
        with clock("read"):
            rest = self.source.read_layer(index, without_experts=True)
            layer = {name: tensor.to(device, torch.float32) for name, tensor in rest.items()}
            gate = CMoEHierarchicalRouter(self.config).to(device)
            gate.parent_weight.copy_(layer.pop(router))
            self.layers.load(index, layer)
            self.layers.replace_ffn(self.arch.ffn.place)
        hidden_WLH = self.streams.carved_WLH
        with clock("forward"):
            for tokens, x_BH in attend(self.layers, hidden_WLH, hidden_WLH):
                self.x_TH[tokens] = x_BH
        if not bool(torch.isfinite(self.x_TH).all()):
            raise overflowed(index)
        carved, figures, y_TH = self.carve_experts(index, gate, clock)
        hidden_WLH.flatten(0, 1).add_(y_TH)
        self.layers.release()
        # The dense down projection ran for all tokens: it is no sample.
        figures["seconds"] = with_totals(clock.seconds, 1)
        rest["mlp.gate.parent_weight"] = rest.pop(router)
        prefix = self.arch.layer_prefix.format(index)
        return {prefix + name: tensor for name, tensor in (rest | carved).items()}, figures

    def carve_experts(
        self, index: int, gate: CMoEHierarchicalRouter, clock: Stopwatch
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any], torch.Tensor]:
        """Carve the source experts of a layer; return tensors, figures and the output (T, H).

        Each is read twice, so that one at a time is in memory as float32: which of its parts run
        may depend on all source experts.
        """
        x_TH, device = self.x_TH, self.x_TH.device
        with clock("forward"):
            weight_TP, expert_TP = gate.parents(x_TH)

        def read(number: int) -> SourceExpert:
            with clock("read"):
                stored = self.source.read_expert(index, number)
                ffn, _ = take_ffn(self.arch, stored, device)
                token_U, slot_U = torch.where(expert_TP == number)
                return SourceExpert(ffn, token_U, weight_TP[token_U, slot_U], x_TH[token_U])

        experts: list[CarvedExpert] = []
        for number in range(len(gate.parent_weight)):
            expert = read(number)
            experts.append(self.divide(index, expert, clock))
        with clock("router"):
            load_router(gate, experts, expert.ffn)
            run_TX = torch.zeros(len(x_TH), len(gate.scale), dtype=torch.bool, device=device)
            run_TX.scatter_(1, gate(x_TH).index_TK, True)
        y_TH, dense_TH = torch.zeros_like(x_TH), torch.zeros_like(x_TH)
        stored: dict[str, list[torch.Tensor]] = {}
        for number, run_TN in enumerate(run_TX.split(gate.per_parent, dim=1)):
            expert, carved = read(number), experts[number]
            down_HF, y_UH, dense_UH = self.fit(expert, carved, run_TN[expert.token_U], clock)
            y_TH.index_add_(0, expert.token_U, y_UH * expert.weight_U[:, None])
            dense_TH.index_add_(0, expert.token_U, dense_UH * expert.weight_U[:, None])
            with clock("slicing"):
                for name, tensor in expert_tensors(expert.ffn, carved.partition, down_HF).items():
                    stored.setdefault(name, []).append(tensor.to(expert.ffn.stored_dtype).cpu())
        if not bool(torch.isfinite(dense_TH).all()):  # of one that is kept whole
            raise overflowed(index)
        with clock("slicing"):
            tensors = {name: torch.cat(parts) for name, parts in stored.items()}
        for name, tensor in gate.state_dict().items():
            if name != "parent_weight":
                tensors[f"mlp.gate.{name}"] = tensor.cpu()
        counts_P = torch.bincount(expert_TP.flatten(), minlength=len(experts))
        figures = {
            "relative_output_error": relative_error(y_TH, dense_TH),
            "tokens_of_parents": counts_P.tolist(),
            "kept_parents": gate.kept_parents,
            "expert_sizes": [self.inner.moe_intermediate_size] * len(gate.scale),
            "expert_loads": run_TX.float().mean(dim=0).tolist(),
        }
        return tensors, figures, y_TH

    def divide(self, index: int, expert: SourceExpert, clock: Stopwatch) -> CarvedExpert:
        """Return partition and router of a source expert; of one that is kept whole, any."""
        ffn, x_UH, inner, recipe = expert.ffn, expert.x_UH, self.inner, self.recipe
        if len(x_UH) < FEWEST * ffn.width:
            everything_F = torch.arange(ffn.width)
            shared_S, routed_R = everything_F.tensor_split([inner.shared_expert_intermediate_size])
            experts_NM = routed_R.view(inner.num_experts, -1)
            return CarvedExpert(Partition(shared_S, experts_NM, experts_NM[:, 0], 0), {}, kept=True)
        with clock("forward"):
            h_UF, marks_UK, is_finite = ffn.profile(
                x_UH, self.k_act, cosine=recipe.cosine_profile, clock=clock
            )
            profile = Profile(x_UH, h_UF * expert.weight_U[:, None], marks_UK.cpu())
        if not is_finite:
            raise overflowed(index)
        with clock("partition"):
            parts = divide(ffn, profile, inner, recipe)
        with clock("router"):
            if recipe.competition == "token":
                energy_UN = output_energies(profile.h_TF, ffn.down_HF, parts.experts_NM)
                square_U1 = expert.weight_U[:, None].square()  # of an unlikely expert perhaps 0
                energy_UN = energy_UN / square_U1.clamp_min(torch.finfo(torch.float32).tiny)
                router = log_energy_router(x_UH, energy_UN, ridge=recipe.router_ridge)
            else:
                router = build_router(ffn, profile, parts, inner, recipe)
        return CarvedExpert(parts, router, kept=False)

    def fit(
        self, expert: SourceExpert, carved: CarvedExpert, run_UN: torch.Tensor, clock: Stopwatch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Refit a source expert to its own output under the routing `run_UN`.

        Returns its down projection (H, F), and its outputs carved and dense, (U, H) each.
        """
        ffn, parts, x_UH, down_HF = expert.ffn, carved.partition, expert.x_UH, expert.ffn.down_HF
        run_UN = run_UN | carved.kept
        with clock("forward_again"):
            h_UF = ffn.hidden(x_UH)
        with clock("dense_down_sample"):
            dense_UH = ffn.output(h_UF)
        with clock("refit"):
            if self.recipe.refit and not carved.kept:
                samples = Samples(x_UH, dense_UH, expert.weight_U)
                ridge = ridge_for(len(x_UH), ffn.width, self.recipe.refit_ridge)
                fit = reconstruct(ffn, parts, run_UN, samples, ridge=ridge)
                down_HF = ffn.rounded(fit.down_HG)
        with clock("carved_down"):
            y_UH = sparse_output(ffn, down_HF, parts, run_UN, x_UH, h_UF)
        return down_HF, y_UH, dense_UH


def load_router(gate: CMoEHierarchicalRouter, experts: list[CarvedExpert], ffn: FFN) -> None:
    """Give the router what was found for each source expert, rounded as it will be stored."""
    gate.kept_parents = [number for number, carved in enumerate(experts) if carved.kept]
    for name, tensor in gate.state_dict().items():
        if name == "parent_weight":
            continue
        rows = tensor.unflatten(0, (len(experts), -1)).zero_()
        for row, carved in zip(rows, experts, strict=True):
            if name in carved.router:
                row.copy_(ffn.rounded(carved.router[name]))


def expert_tensors(ffn: FFN, parts: Partition, down_HF: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the packed tensors of one source expert."""
    tensors = packed(parts.experts_NM, ffn.gate_FH, ffn.up_FH, down_HF)
    if len(parts.shared_S):
        weights = (ffn.gate_FH, ffn.up_FH, down_HF)
        tensors |= packed(parts.shared_S[None], *weights, name="mlp.shared_experts")
    return tensors
