# SPDX-License-Identifier: Apache-2.0
"""One FFN: what it computes, its division into experts, its router, and the tensors stored of it.

Shape suffixes: T tokens, H hidden size, F dense FFN width, G = F, or F + 1 with an output bias,
N routed experts, K active experts or marked neurons per token.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
from transformers.activations import ACT2FN

from cmoe_hf import CMoEConfig
from cmoe_hf.modeling_cmoe import SILU, CMoERouter

from ..device import Stopwatch
from ..source.architectures import Architecture
from .partition import Partition, partition_by_contributions, partition_by_marks, reassigned
from .profile import (
    activation_marks,
    activation_rates,
    activations,
    cosines,
    energies,
    fluctuations,
    weight_ranges,
)
from .recipe import Recipe
from .router import (
    ALWAYS_ON_BIAS,
    linear_router,
    oracle_choice,
    output_energies,
    ranking_router,
    representative_router,
)


@dataclass
class FFN:
    """A dense FFN in float32: y = h downᵀ + down_bias with h = act(x gateᵀ + gate_bias) * (x upᵀ +
    up_bias), or h = act(x upᵀ + up_bias) where there is no gate."""

    gate_FH: torch.Tensor | None
    up_FH: torch.Tensor
    down_HF: torch.Tensor
    act: Callable[[torch.Tensor], torch.Tensor]
    stored_dtype: torch.dtype
    """Precision of the checkpoint: derived weights are rounded to it before they are used, so that
    calibration sees what inference will see."""
    up_bias_F: torch.Tensor | None = None
    down_bias_H: torch.Tensor | None = None
    gate_bias_F: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """Return the number of neurons, F."""
        return len(self.up_FH)

    @property
    def is_biased(self) -> bool:
        """Return whether the output has a bias."""
        return self.down_bias_H is not None

    @cached_property
    def down_with_bias(self) -> torch.Tensor:
        """Return the down projection, (H, G); its bias is the column of a neuron that is 1."""
        if self.down_bias_H is None:
            return self.down_HF
        return torch.cat([self.down_HF, self.down_bias_H.unsqueeze(1)], dim=1)

    def products(self, x_TH: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return x gateᵀ + gate_bias and x upᵀ + up_bias, (T, F) each."""
        up_TF = x_TH @ self.up_FH.T
        if self.up_bias_F is not None:
            up_TF += self.up_bias_F
        if self.gate_FH is None:
            return None, up_TF
        gate_TF = x_TH @ self.gate_FH.T
        return (gate_TF if self.gate_bias_F is None else gate_TF + self.gate_bias_F), up_TF

    def hidden(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Return the hidden activations, (T, F)."""
        return activations(*self.products(x_TH), self.act)

    def profile(
        self, x_TH: torch.Tensor, k: int, *, cosine: bool, clock: Stopwatch
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Return hidden activations (T, F), marks (T, K), and whether all activations are finite.

        With `cosine` the marks are of products of cosines, see `profile.cosines`.
        """
        gate_TF, up_TF = self.products(x_TH)
        h_TF = activations(gate_TF, up_TF, self.act)
        with clock("marks"):
            signal_TF = h_TF
            if cosine:
                if self.gate_FH is not None and gate_TF is not None:
                    gate_TF = cosines(gate_TF, x_TH, self.gate_FH, self.gate_bias_F)
                up_TF = cosines(up_TF, x_TH, self.up_FH, self.up_bias_F)
                signal_TF = activations(gate_TF, up_TF, self.act)
            marks_TK = activation_marks(signal_TF, k)
            # ATopK takes NaN and infinity for the largest, so the marked activations suffice.
            is_finite = bool(torch.isfinite(h_TF.gather(1, marks_TK)).all())
        return h_TF, marks_TK, is_finite

    def output(self, h_TF: torch.Tensor) -> torch.Tensor:
        """Return y for some hidden activations, (T, H)."""
        y_TH = h_TF @ self.down_HF.T
        return y_TH if self.down_bias_H is None else y_TH + self.down_bias_H

    def rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a derived weight as it will be loaded, in float32."""
        return tensor.to(self.stored_dtype).float()


class Profile(NamedTuple):
    """What the calibration tokens do in one FFN."""

    x_TH: torch.Tensor
    """Inputs."""
    h_TF: torch.Tensor
    """Hidden activations, where there are many tokens of the first ones only: the others are
    computed again where they are needed."""
    marks_TK: torch.Tensor
    """Indices of the marked neurons, on the CPU."""

    def first(self) -> Self:
        """Return the part of the tokens whose hidden activations are kept."""
        return self._replace(x_TH=self.x_TH[: len(self.h_TF)])


def take_ffn(
    arch: Architecture, stored: dict[str, torch.Tensor], device: torch.device
) -> tuple[FFN, dict[str, torch.Tensor]]:
    """Return the FFN in `stored`, which is emptied, and all of its tensors, as float32."""
    stored_dtype = stored[f"{arch.ffn.names()['up']}.weight"].dtype
    layer = {}
    for name in list(stored):  # one at a time: no second copy of the whole layer
        layer[name] = stored.pop(name).to(device, torch.float32)
    weights = arch.ffn.take(dict(layer))
    up_FH, down_HF = weights["up"], weights["down"]
    assert up_FH is not None and down_HF is not None  # every FFN has them
    ffn = FFN(
        gate_FH=weights["gate"],
        up_FH=up_FH,
        down_HF=down_HF,
        act=ACT2FN[arch.ffn.activation],
        stored_dtype=stored_dtype,
        gate_bias_F=weights["gate_bias"],
        up_bias_F=weights["up_bias"],
        down_bias_H=weights["down_bias"],
    )
    return ffn, layer


def divide(ffn: FFN, profile: Profile, config: CMoEConfig, recipe: Recipe) -> Partition:
    """Divide the neurons into shared ones and routed experts, by the recipe."""
    measures = {
        "rate": lambda: activation_rates(profile.marks_TK, ffn.width),
        "energy": lambda: energies(profile.h_TF, ffn.down_HF),
        "fluctuation": lambda: fluctuations(profile.h_TF, ffn.down_HF),
        "weight": lambda: weight_ranges(ffn.gate_FH, ffn.up_FH),
    }
    score_F = measures[recipe.importance]()
    shape = {
        "shared": config.shared_expert_intermediate_size,
        "experts": config.num_experts,
        "max_iterations": recipe.max_iterations,
    }
    if recipe.clusters == "marks":
        return partition_by_marks(profile.marks_TK, score_F, metric=recipe.metric, **shape)
    return partition_by_contributions(
        profile.h_TF, ffn.down_HF, score_F, always_on=recipe.always_on, **shape
    )


def build_router(
    ffn: FFN, profile: Profile, parts: Partition, config: CMoEConfig, recipe: Recipe
) -> dict[str, torch.Tensor]:
    """Return the router's parameters as they will be loaded, by the recipe."""
    if recipe.router == "linear":
        x_TH = profile.first().x_TH
        energy_TN = output_energies(profile.h_TF, ffn.down_HF, parts.experts_NM[parts.always_on :])
        router = linear_router(x_TH, energy_TN, ridge=recipe.router_ridge)
        top_k = config.num_experts_per_tok - parts.always_on
        if recipe.router_epochs and 0 < top_k < energy_TN.shape[1]:
            start_NH, epochs = router["linear_weight"], recipe.router_epochs
            router = ranking_router(x_TH, energy_TN, start_NH, top_k=top_k, epochs=epochs)
    else:
        assert parts.representatives_N is not None  # the recipe has been checked
        router = representative_router(
            ffn.gate_FH,
            ffn.up_FH,
            parts.representatives_N,
            gate_bias_F=ffn.gate_bias_F,
            up_bias_F=ffn.up_bias_F,
            normalise=recipe.normalised_rows,
        )
    # An expert that is always on needs no score: its bias decides.
    router = {
        name: torch.cat([w.new_zeros(parts.always_on, *w.shape[1:]), ffn.rounded(w)])
        for name, w in router.items()
    }
    bias_N = torch.zeros(len(parts.experts_NM), device=ffn.up_FH.device)
    bias_N[: parts.always_on] = ALWAYS_ON_BIAS
    return {**router, "balance_bias": bias_N}


def running_experts(
    router: dict[str, torch.Tensor],
    profile: Profile,
    parts: Partition,
    config: CMoEConfig,
    recipe: Recipe,
) -> torch.Tensor:
    """Return which routed experts run for which token, (T, N) bool."""
    if recipe.routed_by == "router":
        index_TK = chosen_experts(router, profile.x_TH, config)
    elif recipe.routed_by == "oracle":
        mass_TN = torch.stack([profile.h_TF[:, m].abs().sum(1) for m in parts.experts_NM], 1)
        index_TK = oracle_choice(mass_TN, config.num_experts_per_tok)
    else:
        chance = torch.Generator().manual_seed(0)  # a resumed run must repeat it
        chance_TN = torch.rand(len(profile.x_TH), config.num_experts, generator=chance)
        index_TK = oracle_choice(chance_TN.to(profile.x_TH.device), config.num_experts_per_tok)
    run_TN = torch.zeros(len(index_TK), config.num_experts, dtype=torch.bool)
    return run_TN.to(index_TK.device).scatter_(1, index_TK, True)


def chosen_experts(
    router: dict[str, torch.Tensor], x_TH: torch.Tensor, config: CMoEConfig
) -> torch.Tensor:
    """Return the experts that run for every token, (T, K) int64.

    The model's own router decides, so that calibration sees what inference will see. Its gates
    are 1: the learned scale is zero after carving.
    """
    module = CMoERouter(config).to(x_TH.device)
    module.load_state_dict(router, strict=False)
    _, _, index_TK = module(x_TH)
    return index_TK


def divide_and_route(
    ffn: FFN, profile: Profile, config: CMoEConfig, recipe: Recipe
) -> tuple[Partition, dict[str, torch.Tensor]]:
    """Return partition and router, made for one another in the recipe's rounds."""
    draft = replace(recipe, router_epochs=0)  # in the rounds it leads to better clusters, measured
    parts = divide(ffn, profile, config, recipe)
    chooses = parts.always_on < config.num_experts_per_tok and recipe.clusters == "contributions"
    for _ in range(recipe.reassignments if chooses else 0):
        router = build_router(ffn, profile, parts, config, draft)
        run_TN = running_experts(router, profile.first(), parts, config, draft)
        parts = reassigned(parts, profile.h_TF, ffn.down_HF, run_TN)
    return parts, build_router(ffn, profile, parts, config, recipe)


@dataclass
class CarvedLayer:
    """A carved FFN."""

    partition: Partition
    router: dict[str, torch.Tensor]
    """Parameters of the router as they will be loaded."""
    down_HG: torch.Tensor
    """The down projection, refitted or not, float32, in the dense order of neurons; with an output
    bias as its last column."""
    run_TN: torch.Tensor
    """Which routed experts ran for the calibration tokens."""
    y_TH: torch.Tensor
    """Output of the carved FFN for the calibration tokens."""
    figures: dict[str, Any]
    """Entries of `conversion.json` from how it was carved."""


def stored_tensors(
    arch: Architecture,
    dense: dict[str, torch.Tensor],
    carved: CarvedLayer,
    *,
    refitted: bool = True,
) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer, carved, in the checkpoint's precision.

    Without `refitted` all of its experts together are the dense FFN.
    """
    tensors, parts, block = dict(dense), carved.partition, arch.block
    weights = arch.ffn.take(tensors)
    gate_FH, up_FH, down_HG = weights["gate"], weights["up"], weights["down"]
    assert up_FH is not None and down_HG is not None  # every FFN has them
    if refitted:
        down_HG = carved.down_HG.to(down_HG)
        if weights["down_bias"] is not None:
            weights["down_bias"] = down_HG[:, -1]
    inputs = {"gate_proj.weight": gate_FH, "up_proj.weight": up_FH}
    inputs |= {f"{part}_proj.bias": weights[f"{part}_bias"] for part in ("gate", "up")}
    if len(parts.shared_S):
        for name, rows_F in inputs.items():
            if rows_F is not None:
                tensors[f"{block}shared_expert.{name}"] = rows_F[parts.shared_S]
        tensors[f"{block}shared_expert.down_proj.weight"] = down_HG[:, parts.shared_S]
    experts = f"{block}experts"
    tensors |= packed(parts.experts_NM, gate_FH, up_FH, down_HG, experts)
    biases = [weights[f"{part}_bias"] for part in ("gate", "up")]
    if rows := [bias_F[parts.experts_NM] for bias_F in biases if bias_F is not None]:
        name = "gate_up_proj" if arch.ffn.has_gate else "up_proj"
        tensors[f"{experts}.{name}_bias"] = torch.cat(rows, dim=1)
    if weights["down_bias"] is not None:
        tensors[f"{block}down_bias"] = weights["down_bias"]
    if arch.ffn.has_gate and arch.ffn.activation not in SILU:
        tensors[f"{experts}.other_activation"] = torch.zeros(1, dtype=up_FH.dtype)
    for name, weight in carved.router.items():
        dtype = torch.float32 if name == "balance_bias" else up_FH.dtype
        tensors[f"{block}gate.{name}"] = weight.to(dtype)
    tensors[f"{block}gate.scale"] = torch.zeros(len(parts.experts_NM), dtype=up_FH.dtype)
    return tensors


def packed(
    experts_NM: torch.Tensor,
    gate_FH: torch.Tensor | None,
    up_FH: torch.Tensor,
    down_HG: torch.Tensor,
    name: str = "mlp.experts",
) -> dict[str, torch.Tensor]:
    """Return the weights of some experts, packed as the model stores them."""
    name_of_up, up_NMH = f"{name}.up_proj", up_FH[experts_NM]
    if gate_FH is not None:
        name_of_up, up_NMH = f"{name}.gate_up_proj", torch.cat([gate_FH[experts_NM], up_NMH], dim=1)
    return {name_of_up: up_NMH, f"{name}.down_proj": down_HG.T[experts_NM].transpose(1, 2)}


def layer_figures(carved: CarvedLayer, profile: Profile, sample_TH: torch.Tensor) -> dict[str, Any]:
    """Return a layer's entries of `conversion.json`.

    `sample_TH` is the dense FFN's output for the first tokens.
    """
    parts, ran_N = carved.partition, carved.run_TN.any(dim=0).cpu()
    rate_F = activation_rates(profile.marks_TK, profile.h_TF.shape[1])
    quartiles = torch.linspace(0, 1, 5, dtype=rate_F.dtype)
    names = ("min", "q25", "median", "q75", "max")
    return {
        "activation_rate": dict(zip(names, rate_F.quantile(quartiles).tolist(), strict=True)),
        "marks_on_shared": rate_F[parts.shared_S].sum().item() / rate_F.sum().item(),
        "shared_neurons": len(parts.shared_S),
        "pinned_experts": parts.always_on,
        "refit_order": len(parts.shared_S) + parts.experts_NM[ran_N].numel(),
        "expert_sizes": [len(ids_M) for ids_M in parts.experts_NM],
        "expert_loads": carved.run_TN.float().mean(dim=0).tolist(),
        "clustering_iterations": parts.iterations,
        "relative_output_error": relative_error(carved.y_TH[: len(sample_TH)], sample_TH),
        **carved.figures,
    }


def relative_error(got_TH: torch.Tensor, target_TH: torch.Tensor) -> float:
    """Return the length of the difference over that of the target; 0 if both are zero."""
    return ((got_TH - target_TH).norm() / target_TH.norm().clamp_min(1e-30)).item()
