# SPDX-License-Identifier: Apache-2.0
"""The algorithm: profile -> partition -> route -> refit, one layer at a time.

`carve_layer` reads like the paper's section 4; `carve_model` walks the layers in order, each
profiled on what the carved layers before it really produce.

Shape suffixes: W windows, L tokens of one window, T = W * L tokens, H hidden size, F dense FFN
width, G = F, or F + 1 with an output bias, N routed experts, K active experts, M neurons of one
expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.activations import ACT2FN

from cmoe_hf import CMoEConfig
from cmoe_hf.modeling_cmoe import CMoERouter

from ..errors import CMoEError
from ..source.architectures import Architecture
from ..source.checkpoint import Source
from ..source.library import AttentionHalf
from .decoder import (
    BATCH_TOKENS,
    FFN,
    Profile,
    Stopwatch,
    Storage,
    Streams,
    profile_layer,
    run_dense_layer,
)
from .partition import Partition, partition_by_contributions, partition_by_marks
from .profile import activation_rates, energies
from .recipe import Recipe
from .refit import active_blocks, down_projected, refit_down, ridge_for
from .router import linear_router, oracle_choice, output_energies, representative_router


@dataclass
class CarvedLayer:
    """The outcome for one layer."""

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


def carve_layer(
    ffn: FFN,
    profile: Profile,
    wanted_TH: torch.Tensor | None,
    config: CMoEConfig,
    recipe: Recipe,
    clock: Stopwatch,
) -> CarvedLayer:
    """Turn one dense FFN into shared expert, routed experts and router (paper, section 4).

    `wanted_TH` is the output that a refit aims at, None for a recipe without one.
    """
    down_HG = ffn.down_with_bias
    with clock("partition"):
        parts = divide(ffn, profile, config, recipe)
    with clock("router"):
        router = build_router(ffn, profile, parts, recipe)
        run_TN = running_experts(router, profile, parts, config, recipe)
    with clock("refit"):
        blocks = active_blocks(profile.h_TF, parts, run_TN, biased=ffn.is_biased)
        if wanted_TH is not None:
            ridge = ridge_for(len(wanted_TH), ffn.width, recipe.refit_ridge)
            down_HG = refit_down(blocks, wanted_TH, down_HG, ridge=ridge)
            down_HG = ffn.rounded(down_HG)
    with clock("carved_down"):
        y_TH = down_projected(blocks, down_HG, len(profile.x_TH))
    return CarvedLayer(parts, router, down_HG, run_TN, y_TH)


def best_split(
    ffn: FFN,
    profile: Profile,
    wanted_TH: torch.Tensor,
    config: CMoEConfig,
    recipe: Recipe,
) -> dict[int, float]:
    """Relative error on held-out tokens for each number of active experts that could be pinned.

    Routing adapts to the token, a fixed choice suits the refit better: which of them wins differs
    from layer to layer. Each candidate is carved on the first seven eighths of the tokens.
    """
    cut = len(wanted_TH) * 7 // 8
    seen, held = profile.part(slice(cut)), profile.part(slice(cut, None))
    errors = {}
    top_k = min(config.num_experts_per_tok, config.num_experts - 1)
    for pinned in sorted({round(top_k * step / 3) for step in range(4)}):
        trial = replace(recipe, pinned=pinned)
        layer = carve_layer(ffn, seen, wanted_TH[:cut], config, trial, Stopwatch())
        run_TN = running_experts(layer.router, held, layer.partition, config, trial)
        blocks = active_blocks(held.h_TF, layer.partition, run_TN, biased=ffn.is_biased)
        y_TH = down_projected(blocks, layer.down_HG, len(run_TN))
        errors[pinned] = relative_error(y_TH, wanted_TH[cut:])
    return errors


def relative_error(got_TH: torch.Tensor, wanted_TH: torch.Tensor) -> float:
    """Length of the difference over that of what was wanted; 0, not NaN, if both are zero."""
    return ((got_TH - wanted_TH).norm() / wanted_TH.norm().clamp_min(1e-30)).item()


def layer_figures(
    carved: CarvedLayer, ffn: FFN, profile: Profile, clock: Stopwatch
) -> dict[str, Any]:
    """What `conversion.json` says about a layer."""
    parts = carved.partition
    rate_F = activation_rates(profile.marks_TK, ffn.width)
    with clock("dense_down_sample"):
        dense_TH = ffn.output(profile.h_TF[:BATCH_TOKENS])
    return {
        "activation_rate": _quantiles(rate_F),
        "marks_on_shared": rate_F[parts.shared_S].sum().item() / rate_F.sum().item(),
        "shared_neurons": len(parts.shared_S),
        "pinned_experts": parts.pinned,
        # Order of the system that a refit solves, see refit.py.
        "refit_order": min(profile.h_TF.shape),
        "expert_sizes": [len(ids_M) for ids_M in parts.experts_NM],
        "expert_loads": carved.run_TN.float().mean(dim=0).tolist(),
        "clustering_iterations": parts.iterations,
        "relative_output_error": relative_error(carved.y_TH[:BATCH_TOKENS], dense_TH),
    }


def divide(ffn: FFN, profile: Profile, config: CMoEConfig, recipe: Recipe) -> Partition:
    """Shared neurons and routed experts, by the recipe's importance and clusters."""
    if recipe.importance == "energy":
        score_F = energies(profile.h_TF, ffn.down_HF)
    else:
        score_F = activation_rates(profile.marks_TK, ffn.width)
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
    ffn: FFN, profile: Profile, parts: Partition, recipe: Recipe
) -> dict[str, torch.Tensor]:
    """The router's parameters as they will be loaded, by the recipe's form."""
    if recipe.router == "linear":
        energy_TN = output_energies(profile.h_TF, ffn.down_HF, parts.experts_NM[parts.pinned :])
        router = linear_router(profile.x_TH, energy_TN, ridge=recipe.router_ridge)
    else:
        assert parts.representatives_N is not None  # the recipe has been checked
        router = representative_router(
            ffn.gate_FH,
            ffn.up_FH,
            parts.representatives_N,
            up_bias_F=ffn.up_bias_F,
            normalise=recipe.normalised_rows,
        )
    # A pinned expert needs no score: its bias lies above every probability.
    router = {
        name: torch.cat([w.new_zeros(parts.pinned, *w.shape[1:]), ffn.rounded(w)])
        for name, w in router.items()
    }
    bias_N = torch.zeros(len(parts.experts_NM), device=ffn.up_FH.device)
    bias_N[: parts.pinned] = 2.0
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


def carve_model(
    source: Source,
    streams: Streams,
    config: CMoEConfig,
    recipe: Recipe,
    *,
    first: int = 0,
    k_act: int,
    storage: Storage,
) -> Iterator[tuple[int, dict[str, torch.Tensor], dict[str, Any]]]:
    """Carve the layers from `first` on; yield (index, tensors to store, figures) of each.

    `streams` enters layer `first`, and after each yield the next one. The arithmetic is float32
    whatever the precision of the checkpoint, which the stored tensors keep. Iterate under
    `torch.no_grad()`: as a decorator here it would keep each layer alive until the next is done.

    Raises `CMoEError` if the weights or the activations are not finite.
    """
    names = source.architecture
    hidden_WLH, dense_WLH = streams.carved_WLH, streams.dense_WLH
    windows, length, hidden = hidden_WLH.shape
    attention = AttentionHalf(names, source.config, length, storage.device)
    profile = Profile.empty(windows * length, hidden, config.intermediate_size, k_act, storage)
    for index in range(first, config.num_hidden_layers):
        clock = Stopwatch()
        with clock("read"):
            ffn, rest = read_layer(source, index, config, storage.device)
            attention.load(index, rest)
        profile_layer(
            ffn, attention, hidden_WLH, profile, cosine=recipe.cosine_profile, clock=clock
        )
        if not profile.is_finite():
            raise overflowed(index)
        wanted_TH = None
        if dense_WLH is not None:
            with clock("dense_stream"):
                run_dense_layer(ffn, attention, dense_WLH)
                wanted_TH = (dense_WLH - hidden_WLH).flatten(0, 1)
        elif recipe.refit:
            with clock("dense_output"):
                wanted_TH = ffn.output(profile.h_TF)
        split, chosen = {}, recipe
        if recipe.adaptive_split and wanted_TH is not None:
            with clock("split"):
                split = best_split(ffn, profile, wanted_TH, config, recipe)
                chosen = replace(recipe, pinned=min(split, key=split.__getitem__))
        carved = carve_layer(ffn, profile, wanted_TH, config, chosen, clock)
        hidden_WLH += carved.y_TH.view_as(hidden_WLH)
        figures = layer_figures(carved, ffn, profile, clock) | ({"split": split} if split else {})
        # Nothing of this layer may wait for the next one: weights are the largest thing in memory.
        attention.release()
        del ffn, rest, wanted_TH
        with clock("read"):
            dense = source.read_layer(index)
        with clock("slicing"):
            prefix = names.carved_name(names.layer_prefix.format(index))
            tensors = stored_tensors(names, prefix, dense, carved)
        figures["seconds"] = clock.report(windows * length)
        del dense, carved
        yield index, tensors, figures
        del tensors


def read_layer(
    source: Source, index: int, config: CMoEConfig, device: torch.device
) -> tuple[FFN, dict[str, torch.Tensor]]:
    """The FFN of a layer, and the other tensors, in float32 on the device."""
    return take_ffn(source.architecture, source.read_layer(index), config, device)


def take_ffn(
    names: Architecture, stored: dict[str, torch.Tensor], config: CMoEConfig, device: torch.device
) -> tuple[FFN, dict[str, torch.Tensor]]:
    """The FFN of some tensors, which are used up, and the others, in float32 on the device."""
    stored_dtype = stored[names.up].dtype
    layer = {}
    for name in list(stored):  # one at a time: no second copy of the whole layer
        layer[name] = stored.pop(name).to(device, torch.float32)
    ffn = FFN(
        gate_FH=layer.pop(names.gate) if names.gate else None,
        up_FH=layer.pop(names.up),
        down_HF=layer.pop(names.down),
        act=ACT2FN[config.hidden_act],
        stored_dtype=stored_dtype,
        up_bias_F=layer.pop(names.up_bias) if names.up_bias else None,
        down_bias_H=layer.pop(names.down_bias) if names.down_bias else None,
    )
    return ffn, layer


def overflowed(index: int) -> CMoEError:
    """What to raise where finite weights yield activations that are not."""
    return CMoEError(
        f"layer {index} produces NaN or infinite activations on the calibration text, from finite "
        "weights: the checkpoint overflows. Try another one."
    )


def stored_tensors(
    names: Architecture, prefix: str, dense: dict[str, torch.Tensor], carved: CarvedLayer
) -> dict[str, torch.Tensor]:
    """The tensors of a carved layer in the checkpoint's precision, named with `prefix`."""
    tensors = dict(dense)
    parts = (names.gate, names.up, names.down, names.up_bias, names.down_bias)
    gate_FH, up_FH, down_HF, up_bias_F, down_bias_H = (
        None if part is None else tensors.pop(part) for part in parts
    )
    assert up_FH is not None and down_HF is not None  # every row names them
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
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _quantiles(rate_F: torch.Tensor) -> dict[str, float]:
    """Minimum, quartiles, maximum."""
    points = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=rate_F.dtype)
    values = torch.quantile(rate_F, points).tolist()
    return dict(zip(("min", "q25", "median", "q75", "max"), values, strict=True))
