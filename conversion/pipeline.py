# SPDX-License-Identifier: Apache-2.0
"""The algorithm: profile -> partition -> route -> refit, one layer at a time.

`carve_layer` reads like the paper's section 4; `carve_model` walks the layers in order, each
profiled on what the carved layers before it really produce.

Shape suffixes: W windows, L tokens of one window, T = W * L tokens, H hidden size, F dense FFN
width, E = 1 + N experts (column 0 the shared one), N routed experts, K active experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from tqdm import tqdm
from transformers.activations import ACT2FN

from cmoe_hf import CMoELlamaConfig
from cmoe_hf.configuration_cmoe import ROUTER_TYPES
from cmoe_hf.modeling_cmoe import CMoERouter

from .architectures import Architecture
from .checkpoint import Source
from .decoder import (
    BATCH_TOKENS,
    FFN,
    AttentionHalf,
    Profile,
    Stopwatch,
    profile_layer,
    run_dense_layer,
)
from .errors import CMoEError, RequestError
from .partition import Partition, partition_by_contributions, partition_by_marks
from .profile import activation_rates, energies
from .refit import refit_down
from .router import linear_router, output_energies, representative_router


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The choices in which the paper, its released code (method, section 11.1) and ours differ."""

    cosine_profile: bool = False
    """Mark neurons by products of cosines instead of by their true activations."""
    importance: str = "rate"
    """What makes a neuron shared: its activation `"rate"`, or the `"energy"` of what it writes."""
    clusters: str = "marks"
    """Cluster neurons by their `"marks"`, or by their `"contributions"` to the output."""
    metric: str = "l2"
    """Distance between columns of marks: `"l2"` or `"l1"`."""
    max_iterations: int = 20
    """Assignments of the balanced clustering."""
    router: str = "representative"
    """`"representative"` neurons, or `"linear"`: a ridge regression of the experts' energies."""
    absolute_score: bool = False
    """Route by |s| instead of s."""
    normalised_rows: bool = False
    """Scale the rows of the representative router to length 1."""
    router_ridge: float = 0.5
    """Strength of the linear router's ridge, relative to a mean squared input feature."""
    refit: bool = False
    """Refit the down projections under the routing."""
    refit_ridge: float = 0.003
    """Strength of the refit's ridge, relative to a mean squared activation."""
    error_correction: bool = False
    """Let the refit aim at the dense model's hidden states, which also undoes what earlier layers
    got wrong, instead of at the dense FFN's output."""

    def __post_init__(self) -> None:
        """Raises `RequestError` for a choice that does not exist or goes with no other."""
        for choice in fields(self):
            kind = type(choice.default)
            value = getattr(self, choice.name)
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise RequestError(
                    f"the recipe's {choice.name} is {value!r}; it must be of type {kind.__name__}."
                )
        for name, known in _KNOWN_CHOICES.items():
            if getattr(self, name) not in known:
                raise RequestError(
                    f"the recipe's {name} is {getattr(self, name)!r}; it can be {', '.join(known)}."
                )
        if self.router == "representative" and self.clusters != "marks":
            raise RequestError(
                "a representative router needs clusters of marks: change both, or neither."
            )
        if min(self.max_iterations, self.router_ridge, self.refit_ridge) <= 0:
            raise RequestError("the recipe's max_iterations and ridges must be above 0.")


_KNOWN_CHOICES = {
    "importance": ("rate", "energy"),
    "clusters": ("marks", "contributions"),
    "metric": ("l1", "l2"),
    "router": ROUTER_TYPES,
}

RECIPES: dict[str, Recipe] = {
    # arXiv 2502.04416v3 as written.
    "paper": Recipe(),
    # The authors' code, where it differs.
    "released": Recipe(
        cosine_profile=True,
        metric="l1",
        max_iterations=1,
        absolute_score=True,
        normalised_rows=True,
    ),
    # Ours: the best we know without gradient descent.
    "refined": Recipe(
        importance="energy",
        clusters="contributions",
        max_iterations=8,
        router="linear",
        refit=True,
        error_correction=True,
    ),
}


@dataclass
class CarvedLayer:
    """The outcome for one layer."""

    partition: Partition
    router: dict[str, torch.Tensor]
    down_HF: torch.Tensor
    """The down projection, refitted or not, float32, in the dense order of neurons."""
    y_TH: torch.Tensor
    """Output of the carved FFN for the calibration tokens."""
    figures: dict[str, Any]
    """What `conversion.json` says about the layer."""


def carve_layer(
    ffn: FFN,
    profile: Profile,
    wanted_TH: torch.Tensor | None,
    config: CMoELlamaConfig,
    recipe: Recipe,
    clock: Stopwatch,
) -> CarvedLayer:
    """Turn one dense FFN into shared expert, routed experts and router (paper, section 4).

    `wanted_TH` is the output that a refit aims at, by default that of the dense FFN.
    """
    down_HF = ffn.down_HF
    with clock("partition"):
        rate_F = activation_rates(profile.marks_TK, len(ffn.gate_FH))
        parts = divide(ffn, profile, rate_F, config, recipe)
    with clock("router"):
        router = build_router(ffn, profile, parts, recipe)
        router = {name: ffn.rounded(weight) for name, weight in router.items()}
        weight_TE = expert_weights(router, profile.x_TH, config)
    if recipe.refit:
        with clock("refit"):
            wanted_TH = profile.h_TF @ down_HF.T if wanted_TH is None else wanted_TH
            weighed = weighed_activations(profile.h_TF, weight_TE, parts)
            down_HF = refit_down(
                zip(weighed, wanted_TH.split(BATCH_TOKENS), strict=True),
                down_HF,
                ridge=recipe.refit_ridge,
            )
            down_HF = ffn.rounded(down_HF)
    with clock("carved_down"):
        weighed = weighed_activations(profile.h_TF, weight_TE, parts)
        y_TH = torch.cat([z_tF @ down_HF.T for z_tF in weighed])
    with clock("dense_down_sample"):
        dense_TH = profile.h_TF[:BATCH_TOKENS] @ ffn.down_HF.T
    # A layer whose FFN writes nothing has no relative error: 0, not NaN.
    error = (y_TH[:BATCH_TOKENS] - dense_TH).norm() / dense_TH.norm().clamp_min(1e-30)
    figures = {
        "activation_rate": _quantiles(rate_F),
        "marks_on_shared": rate_F[parts.shared_S].sum().item() / rate_F.sum().item(),
        "shared_neurons": len(parts.shared_S),
        "expert_sizes": [len(ids_M) for ids_M in parts.experts_NM],
        "expert_loads": (weight_TE[:, 1:] != 0).float().mean(dim=0).tolist(),
        "clustering_iterations": parts.iterations,
        "relative_output_error": error.item(),
    }
    return CarvedLayer(parts, router, down_HF, y_TH, figures)


def divide(
    ffn: FFN, profile: Profile, rate_F: torch.Tensor, config: CMoELlamaConfig, recipe: Recipe
) -> Partition:
    """Shared neurons and routed experts, by the recipe's importance and clusters."""
    score_F = rate_F
    if recipe.importance == "energy":
        score_F = energies(profile.h_TF, ffn.down_HF)
    shape = {
        "shared": config.shared_expert_intermediate_size,
        "experts": config.num_experts,
        "max_iterations": recipe.max_iterations,
    }
    if recipe.clusters == "contributions":
        return partition_by_contributions(profile.h_TF, ffn.down_HF, score_F, **shape)
    return partition_by_marks(profile.marks_TK, score_F, metric=recipe.metric, **shape)


def build_router(
    ffn: FFN, profile: Profile, parts: Partition, recipe: Recipe
) -> dict[str, torch.Tensor]:
    """The router's weights, by the recipe's form."""
    if recipe.router == "linear":
        energy_TN = output_energies(profile.h_TF, ffn.down_HF, parts.experts_NM)
        return linear_router(profile.x_TH, energy_TN, ridge=recipe.router_ridge)
    assert parts.representatives_N is not None  # the recipe has been checked
    return representative_router(
        ffn.gate_FH, ffn.up_FH, parts.representatives_N, normalise=recipe.normalised_rows
    )


def expert_weights(
    router: dict[str, torch.Tensor], x_TH: torch.Tensor, config: CMoELlamaConfig
) -> torch.Tensor:
    """Gate weight of every expert for every token, (T, E); 0 where it does not run.

    The model's own router decides, so that calibration sees what inference will see.
    """
    module = CMoERouter(config).to(x_TH.device)
    module.load_state_dict(router, strict=False)
    _, weight_TK, index_TK = module(x_TH)
    weight_TE = x_TH.new_zeros(len(x_TH), 1 + config.num_experts)
    weight_TE[:, 0] = 1
    return weight_TE.scatter_(1, 1 + index_TK, weight_TK)


def weighed_activations(
    h_TF: torch.Tensor, weight_TE: torch.Tensor, parts: Partition
) -> Iterator[torch.Tensor]:
    """Activations weighed as the experts that own them, some tokens at a time, (t, F) (eq. 2, 9).

    What the carved FFN's down projection sees, in the dense order of neurons. Multiplying by zero
    and then by a dense matrix is faster here than gathering the columns of each expert.
    """
    owner_EF = torch.zeros(weight_TE.shape[1], h_TF.shape[1], device=h_TF.device)
    owner_EF[0, parts.shared_S] = 1
    for expert, ids_M in enumerate(parts.experts_NM, start=1):
        owner_EF[expert, ids_M] = 1
    chunks = zip(h_TF.split(BATCH_TOKENS), weight_TE.split(BATCH_TOKENS), strict=True)
    return ((weight_tE @ owner_EF).mul_(h_tF) for h_tF, weight_tE in chunks)


@torch.no_grad()
def carve_model(
    source: Source,
    windows_WL: torch.Tensor,
    config: CMoELlamaConfig,
    recipe: Recipe,
    *,
    k_act: int,
    device: torch.device,
) -> Iterator[tuple[int, dict[str, torch.Tensor], dict[str, Any]]]:
    """Carve every layer in order; yield (shard number, tensors to store, figures).

    Shard 0 holds the tensors outside the layers, without figures. The arithmetic is float32
    whatever the precision of the checkpoint, which the stored tensors keep.

    Raises `CMoEError` if the weights or the activations are not finite.
    """
    names = source.architecture
    rest = source.read_rest()
    hidden_WLH = rest[names.embedding][windows_WL].to(device, torch.float32)
    yield 0, rest, {}
    del rest
    attention = AttentionHalf(names, source.config, windows_WL.shape[1], device)
    profile = Profile.empty(
        windows_WL.numel(), config.hidden_size, config.intermediate_size, k_act, device
    )
    dense_WLH = hidden_WLH.clone() if recipe.error_correction else None
    for index in tqdm(range(config.num_hidden_layers), desc="carving", unit="layer", disable=None):
        clock = Stopwatch()
        with clock("read"):
            stored = source.read_layer(index)
            layer = {name: tensor.to(device, torch.float32) for name, tensor in stored.items()}
            ffn = FFN(
                gate_FH=layer.pop(names.gate),
                up_FH=layer.pop(names.up),
                down_HF=layer.pop(names.down),
                act=ACT2FN[config.hidden_act],
                stored_dtype=stored[names.gate].dtype,
            )
            attention.load(layer)
        profile_layer(
            ffn, attention, hidden_WLH, profile, cosine=recipe.cosine_profile, clock=clock
        )
        if not profile.is_finite():
            raise CMoEError(
                f"layer {index} produces NaN or infinite activations on the calibration text, "
                "from finite weights: the checkpoint overflows. Try another one."
            )
        wanted_TH = None
        if dense_WLH is not None:
            with clock("dense_stream"):
                run_dense_layer(ffn, attention, dense_WLH)
                wanted_TH = (dense_WLH - hidden_WLH).flatten(0, 1)
        carved = carve_layer(ffn, profile, wanted_TH, config, recipe, clock)
        hidden_WLH += carved.y_TH.view_as(hidden_WLH)
        tensors = stored_tensors(names, stored, carved)
        prefix = names.layer_prefix.format(index)
        figures = {**carved.figures, "seconds": clock.report(len(profile.x_TH))}
        yield index + 1, {prefix + name: tensor for name, tensor in tensors.items()}, figures


def stored_tensors(
    names: Architecture, dense: dict[str, torch.Tensor], carved: CarvedLayer
) -> dict[str, torch.Tensor]:
    """The tensors of a carved layer in the checkpoint's precision, named relative to it."""
    tensors = dict(dense)
    gate_FH, up_FH, down_HF = (tensors.pop(name) for name in (names.gate, names.up, names.down))
    down_HF = carved.down_HF.to(down_HF)
    shared_S, experts_NM = carved.partition.shared_S, carved.partition.experts_NM
    if len(shared_S):
        tensors["mlp.shared_expert.gate_proj.weight"] = gate_FH[shared_S]
        tensors["mlp.shared_expert.up_proj.weight"] = up_FH[shared_S]
        tensors["mlp.shared_expert.down_proj.weight"] = down_HF[:, shared_S]
    tensors["mlp.experts.gate_up_proj"] = torch.cat([gate_FH[experts_NM], up_FH[experts_NM]], dim=1)
    tensors["mlp.experts.down_proj"] = down_HF.T[experts_NM].transpose(1, 2)
    for name, weight in carved.router.items():
        tensors[f"mlp.gate.{name}"] = weight.to(gate_FH.dtype)
    tensors["mlp.gate.scale"] = torch.zeros(len(experts_NM), dtype=gate_FH.dtype)
    tensors["mlp.gate.balance_bias"] = torch.zeros(len(experts_NM), dtype=torch.float32)
    return tensors


def _quantiles(rate_F: torch.Tensor) -> dict[str, float]:
    """Minimum, quartiles, maximum."""
    points = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=rate_F.dtype)
    values = torch.quantile(rate_F, points).tolist()
    return dict(zip(("min", "q25", "median", "q75", "max"), values, strict=True))
