# SPDX-License-Identifier: Apache-2.0
"""One FFN: what it computes, into what it is divided, who is routed to, and what is stored of it.

Shape suffixes: T tokens, H hidden size, F dense FFN width, G = F, or F + 1 with an output bias,
N routed experts, K active experts or marked neurons per token, M neurons of one expert.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from transformers.activations import ACT2FN

from cmoe_hf import CMoEConfig
from cmoe_hf.modeling_cmoe import CMoERouter

from ..errors import CMoEError
from ..source.architectures import Architecture
from ..source.checkpoint import Source
from .partition import (
    Partition,
    partition_by_contributions,
    partition_by_marks,
    reassigned,
)
from .profile import (
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

Empty = Callable[..., torch.Tensor]
"""Makes an uninitialised float32 tensor of a name and a shape."""


@dataclass
class FFN:
    """A dense FFN in float32: y = h downᵀ + down_bias with h = act(x gateᵀ) * (x upᵀ), or
    h = act(x upᵀ + up_bias) where there is no gate."""

    gate_FH: torch.Tensor | None
    up_FH: torch.Tensor
    down_HF: torch.Tensor
    act: Callable[[torch.Tensor], torch.Tensor]
    stored_dtype: torch.dtype
    """Precision of the checkpoint: what is derived is rounded to it before it is used, so that
    calibration sees what inference will see."""
    up_bias_F: torch.Tensor | None = None
    down_bias_H: torch.Tensor | None = None
    is_polished: bool = False
    """Whether gate and up are no longer the checkpoint's."""

    @property
    def width(self) -> int:
        """Neurons, F."""
        return len(self.up_FH)

    @property
    def is_biased(self) -> bool:
        """Whether the output has a bias."""
        return self.down_bias_H is not None

    @cached_property
    def down_with_bias(self) -> torch.Tensor:
        """The down projection, (H, G): its bias is the column of a neuron that is always 1."""
        if self.down_bias_H is None:
            return self.down_HF
        return torch.cat([self.down_HF, self.down_bias_H.unsqueeze(1)], dim=1)

    def products(self, x_TH: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """x gateᵀ and x upᵀ + up_bias, (T, F) each."""
        up_TF = x_TH @ self.up_FH.T
        if self.up_bias_F is not None:
            up_TF += self.up_bias_F
        return (None if self.gate_FH is None else x_TH @ self.gate_FH.T), up_TF

    def hidden(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Hidden activations, (T, F)."""
        return activations(*self.products(x_TH), self.act)

    def cosine_hidden(
        self, x_TH: torch.Tensor, gate_TF: torch.Tensor | None, up_TF: torch.Tensor
    ) -> torch.Tensor:
        """The same with products of lengths 1, (T, F), see `profile.cosines`."""
        if self.gate_FH is not None and gate_TF is not None:
            gate_TF = cosines(gate_TF, x_TH, self.gate_FH)
        up_TF = cosines(up_TF, x_TH, self.up_FH, self.up_bias_F)
        return activations(gate_TF, up_TF, self.act)

    def output(self, h_TF: torch.Tensor) -> torch.Tensor:
        """y of some hidden activations, (T, H)."""
        y_TH = h_TF @ self.down_HF.T
        return y_TH if self.down_bias_H is None else y_TH + self.down_bias_H

    def rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        """A derived weight as it will be loaded, in float32."""
        return tensor.to(self.stored_dtype).float()


@dataclass
class Profile:
    """What the calibration tokens do in one FFN. Overwritten layer by layer: the buffers are the
    largest thing in memory, and touching new ones costs as much as some of the arithmetic."""

    x_TH: torch.Tensor
    """Inputs."""
    h_TF: torch.Tensor
    """Hidden activations, of the first tokens only where there are many: the others are made again
    where they are needed."""
    marks_TK: torch.Tensor
    """Indices of the marked neurons, on the CPU."""
    is_finite: bool = True
    """Whether no activation is NaN or infinite."""

    @classmethod
    def empty(cls, tokens: int, kept: int, hidden: int, width: int, k: int, empty: Empty) -> Self:
        """Buffers for `tokens` tokens, and hidden activations of the first `kept` ones."""
        return cls(
            x_TH=empty("inputs", tokens, hidden),
            h_TF=empty("hidden", kept, width),
            marks_TK=torch.empty(tokens, k, dtype=torch.int64),
        )

    @property
    def k_act(self) -> int:
        """Marked neurons per token."""
        return self.marks_TK.shape[1]


def take_ffn(
    row: Architecture, stored: dict[str, torch.Tensor], config: CMoEConfig, device: torch.device
) -> tuple[FFN, dict[str, torch.Tensor]]:
    """The FFN of some tensors, which are used up, and the others, in float32 on the device."""
    stored_dtype = stored[row.up].dtype
    layer = {}
    for name in list(stored):  # one at a time: no second copy of the whole layer
        layer[name] = stored.pop(name).to(device, torch.float32)
    ffn = FFN(
        gate_FH=layer.pop(row.gate) if row.gate else None,
        up_FH=layer.pop(row.up),
        down_HF=layer.pop(row.down),
        act=ACT2FN[config.hidden_act],
        stored_dtype=stored_dtype,
        up_bias_F=layer.pop(row.up_bias) if row.up_bias else None,
        down_bias_H=layer.pop(row.down_bias) if row.down_bias else None,
    )
    return ffn, layer


def importance(ffn: FFN, profile: Profile, measure: str) -> torch.Tensor:
    """What decides which neurons are shared, (F,) float64: one of the recipe's measures."""
    if measure == "energy":
        return energies(profile.h_TF, ffn.down_HF)
    if measure == "fluctuation":
        return fluctuations(profile.h_TF, ffn.down_HF)
    if measure == "weight":
        return weight_ranges(ffn.gate_FH, ffn.up_FH)
    return activation_rates(profile.marks_TK, ffn.width)


def divide(ffn: FFN, profile: Profile, config: CMoEConfig, recipe: Recipe) -> Partition:
    """Shared neurons and routed experts, by the recipe's importance and clusters."""
    score_F = importance(ffn, profile, recipe.importance)
    shape = {
        "shared": config.shared_expert_intermediate_size,
        "experts": config.num_experts,
        "max_iterations": recipe.max_iterations,
    }
    if recipe.clusters == "contributions":
        return partition_by_contributions(
            profile.h_TF, ffn.down_HF, score_F, pinned=recipe.pinned, **shape
        )
    return partition_by_marks(profile.marks_TK, score_F, metric=recipe.metric, **shape)


def build_router(
    ffn: FFN, profile: Profile, parts: Partition, config: CMoEConfig, recipe: Recipe
) -> dict[str, torch.Tensor]:
    """The router's parameters as they will be loaded, by the recipe's form."""
    if recipe.router == "linear":
        x_TH = profile.x_TH[: len(profile.h_TF)]
        energy_TN = output_energies(profile.h_TF, ffn.down_HF, parts.experts_NM[parts.pinned :])
        router = linear_router(x_TH, energy_TN, ridge=recipe.router_ridge)
        top_k = config.num_experts_per_tok - parts.pinned
        if recipe.router_epochs and 0 < top_k < energy_TN.shape[1]:
            start_NH, epochs = router["linear_weight"], recipe.router_epochs
            router = ranking_router(x_TH, energy_TN, start_NH, top_k=top_k, epochs=epochs)
    else:
        assert parts.representatives_N is not None  # the recipe has been checked
        router = representative_router(
            ffn.gate_FH,
            ffn.up_FH,
            parts.representatives_N,
            up_bias_F=ffn.up_bias_F,
            normalise=recipe.normalised_rows,
        )
    # An expert that is always on needs no score: its bias decides.
    router = {
        name: torch.cat([w.new_zeros(parts.pinned, *w.shape[1:]), ffn.rounded(w)])
        for name, w in router.items()
    }
    bias_N = torch.zeros(len(parts.experts_NM), device=ffn.up_FH.device)
    bias_N[: parts.pinned] = ALWAYS_ON_BIAS
    return {**router, "balance_bias": bias_N}


def running_experts(
    router: dict[str, torch.Tensor],
    profile: Profile,
    parts: Partition,
    config: CMoEConfig,
    recipe: Recipe,
) -> torch.Tensor:
    """Which routed experts run for which token, (T, N) bool."""
    if recipe.routed_by == "router":
        index_TK = chosen_experts(router, profile.x_TH, config)
    else:
        if recipe.routed_by == "oracle":
            mass_TN = torch.stack([profile.h_TF[:, m].abs().sum(1) for m in parts.experts_NM], 1)
        else:
            chance = torch.Generator().manual_seed(0)  # a resumed run must repeat it
            mass_TN = torch.rand(len(profile.x_TH), config.num_experts, generator=chance)
            mass_TN = mass_TN.to(profile.x_TH.device)
        index_TK = oracle_choice(mass_TN, config.num_experts_per_tok)
    run_TN = torch.zeros(len(index_TK), config.num_experts, dtype=torch.bool)
    return run_TN.to(index_TK.device).scatter_(1, index_TK, True)


def chosen_experts(
    router: dict[str, torch.Tensor], x_TH: torch.Tensor, config: CMoEConfig
) -> torch.Tensor:
    """The experts that run for every token, (T, K) int64.

    The model's own router decides, so that calibration sees what inference will see. Its gates
    are 1: the learned scale is zero after carving.
    """
    module = CMoERouter(config).to(x_TH.device)
    module.load_state_dict(router, strict=False)
    _, _, index_TK = module(x_TH)
    return index_TK


def divide_for_router(
    ffn: FFN, profile: Profile, config: CMoEConfig, recipe: Recipe
) -> tuple[Partition, dict[str, torch.Tensor]]:
    """Partition and parameters of the router, made for one another in turns, by the recipe's
    rounds."""
    sample = replace(profile, x_TH=profile.x_TH[: len(profile.h_TF)])
    draft = replace(recipe, router_epochs=0)  # in the rounds it leads to better clusters, measured
    parts = divide(ffn, profile, config, recipe)
    chooses = parts.pinned < config.num_experts_per_tok and recipe.clusters == "contributions"
    for _ in range(recipe.reassignments if chooses else 0):
        router = build_router(ffn, profile, parts, config, draft)
        run_TN = running_experts(router, sample, parts, config, draft)
        parts = reassigned(parts, profile.h_TF, ffn.down_HF, run_TN)
    return parts, build_router(ffn, profile, parts, config, recipe)


@dataclass
class CarvedLayer:
    """The outcome for one layer."""

    partition: Partition
    router: dict[str, torch.Tensor]
    """Parameters of the router as they will be loaded."""
    ffn: FFN
    """The FFN, its gate and up projections polished or not, in the dense order of neurons."""
    down_HG: torch.Tensor
    """The down projection, refitted or not, float32; with an output bias as its last column."""
    run_TN: torch.Tensor
    """Which routed experts ran for the calibration tokens."""
    y_TH: torch.Tensor
    """Output of the carved FFN for the calibration tokens."""
    figures: dict[str, Any]
    """What the reconstruction found out."""


def stored_tensors(
    row: Architecture, index: int, dense: dict[str, torch.Tensor], carved: CarvedLayer
) -> dict[str, torch.Tensor]:
    """The tensors of layer `index`, carved, in the checkpoint's precision."""
    tensors = dict(dense)
    parts = (row.gate, row.up, row.down, row.up_bias, row.down_bias)
    gate_FH, up_FH, down_HF, up_bias_F, down_bias_H = (
        None if part is None else tensors.pop(part) for part in parts
    )
    assert up_FH is not None and down_HF is not None  # every row names them
    if carved.ffn.is_polished:
        up_FH = carved.ffn.up_FH.to(up_FH)
        gate_FH = None if carved.ffn.gate_FH is None else carved.ffn.gate_FH.to(up_FH)
    down_HG = carved.down_HG.to(down_HF)
    shared_S, experts_NM = carved.partition.shared_S, carved.partition.experts_NM
    inputs = {"gate_proj.weight": gate_FH, "up_proj.weight": up_FH, "up_proj.bias": up_bias_F}
    if len(shared_S):
        for name, rows_F in inputs.items():
            if rows_F is not None:
                tensors[f"mlp.shared_expert.{name}"] = rows_F[shared_S]
        tensors["mlp.shared_expert.down_proj.weight"] = down_HG[:, shared_S]
    if gate_FH is not None:
        packed = [gate_FH[experts_NM], up_FH[experts_NM]]
        tensors["mlp.experts.gate_up_proj"] = torch.cat(packed, dim=1)
    else:
        tensors["mlp.experts.up_proj"] = up_FH[experts_NM]
    if up_bias_F is not None:
        tensors["mlp.experts.up_proj_bias"] = up_bias_F[experts_NM]
    tensors["mlp.experts.down_proj"] = down_HG.T[experts_NM].transpose(1, 2)
    if down_bias_H is not None:
        tensors["mlp.down_bias"] = down_HG[:, -1]
    for name, weight in carved.router.items():
        dtype = torch.float32 if name == "balance_bias" else up_FH.dtype
        tensors[f"mlp.gate.{name}"] = weight.to(dtype)
    tensors["mlp.gate.scale"] = torch.zeros(len(experts_NM), dtype=up_FH.dtype)
    return {row.carved_layer(index) + name: tensor for name, tensor in tensors.items()}


def dense_layer(
    source: Source, index: int, seconds: dict[str, float]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of layer `index` as they are, and what `conversion.json` says about it."""
    prefix = source.architecture.carved_layer(index)
    tensors = {prefix + name: tensor for name, tensor in source.read_layer(index).items()}
    return tensors, {"dense": True, "relative_output_error": 0.0, "seconds": seconds}


def layer_figures(carved: CarvedLayer, profile: Profile, sample_TH: torch.Tensor) -> dict[str, Any]:
    """What `conversion.json` says about a layer. `sample_TH` is the dense FFN's output for the
    first tokens."""
    parts = carved.partition
    rate_F = activation_rates(profile.marks_TK, profile.h_TF.shape[1])
    quartiles = torch.linspace(0, 1, 5, dtype=rate_F.dtype)
    names = ("min", "q25", "median", "q75", "max")
    return {
        "activation_rate": dict(zip(names, rate_F.quantile(quartiles).tolist(), strict=True)),
        "marks_on_shared": rate_F[parts.shared_S].sum().item() / rate_F.sum().item(),
        "shared_neurons": len(parts.shared_S),
        "pinned_experts": parts.pinned,
        # Order of the system that a refit solves, see refit.py.
        "refit_order": min(len(profile.x_TH), profile.h_TF.shape[1]),
        "expert_sizes": [len(ids_M) for ids_M in parts.experts_NM],
        "expert_loads": carved.run_TN.float().mean(dim=0).tolist(),
        "clustering_iterations": parts.iterations,
        "relative_output_error": relative_error(carved.y_TH[: len(sample_TH)], sample_TH),
        **carved.figures,
    }


def all_finite(h_TF: torch.Tensor, marks_TK: torch.Tensor) -> bool:
    """No NaN and no infinity: ATopK takes them for the largest, so the marked tell it all."""
    return bool(torch.isfinite(h_TF.gather(1, marks_TK.to(h_TF.device))).all())


def relative_error(got_TH: torch.Tensor, wanted_TH: torch.Tensor) -> float:
    """Length of the difference over that of what was wanted; 0, not NaN, if both are zero."""
    return ((got_TH - wanted_TH).norm() / wanted_TH.norm().clamp_min(1e-30)).item()


def overflowed(index: int) -> CMoEError:
    """What to raise where finite weights yield activations that are not."""
    return CMoEError(
        f"layer {index} produces NaN or infinite activations on the calibration text, from finite "
        "weights: the checkpoint overflows. Try another one."
    )
