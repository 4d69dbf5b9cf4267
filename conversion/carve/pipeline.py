# SPDX-License-Identifier: Apache-2.0
"""The algorithm: profile -> partition -> route -> refit, one layer at a time.

`carve_layer` reads like the paper's section 4; `carve_model` walks the layers in order, each
profiled on what the carved layers before it really produce.

Shape suffixes: W windows, L tokens of one window, T = W * L tokens, H hidden size, G = F, the dense
FFN width, or F + 1 with an output bias, N routed experts.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from cmoe_hf import CMoEConfig

from ..device import Stopwatch
from ..source.calibration import held_out
from ..source.checkpoint import Source
from ..source.library import AttentionHalf
from .decoder import (
    BATCH_TOKENS,
    PROFILED_TOKENS,
    Storage,
    Streams,
    dense_output,
    profile_layer,
    run_dense_layer,
    sparse_output,
    with_totals,
)
from .layer import (
    FFN,
    CarvedLayer,
    Profile,
    dense_layer,
    divide_for_router,
    layer_figures,
    overflowed,
    running_experts,
    stored_tensors,
    take_ffn,
)
from .partition import Partition
from .polish import Schedule
from .recipe import Recipe
from .reconstruct import Reconstruction, reconstruct
from .refit import refit_down, ridge_for, token_weights


class Tried(NamedTuple):
    """The better one of two splits."""

    parts: Partition
    router: dict[str, torch.Tensor]
    refit: Reconstruction | None
    """If it is the one that the layer wants: of all tokens, under this router, not polished."""


def carve_layer(
    ffn: FFN,
    profile: Profile,
    wanted_TH: torch.Tensor | None,
    config: CMoEConfig,
    recipe: Recipe,
    clock: Stopwatch,
    *,
    held: int,
    weight_T: torch.Tensor | None = None,
    tried: Tried | None = None,
) -> CarvedLayer:
    """Turn one dense FFN into shared expert, routed experts and router (paper, section 4).

    `wanted_TH` is the output that a refit aims at, None for a recipe without one; `held` of its
    last tokens choose how, and `weight_T` is what a token's error is multiplied by. `tried` is
    what `best_split` has found.
    """
    sparse, down_HG = ffn, ffn.down_with_bias
    found: dict[str, Any] = {}
    with clock("partition"):
        parts, router = (tried or divide_for_router(ffn, profile, config, recipe))[:2]
    with clock("router"):
        run_TN = running_experts(router, profile, parts, config, recipe)
    with clock("refit"):
        if wanted_TH is not None and recipe.held_out_ridge:
            tokens = (run_TN, profile.x_TH, wanted_TH)
            schedule = Schedule(epochs=recipe.polish_epochs) if recipe.polish_epochs else None
            better = (tried and tried.refit) or reconstruct(
                ffn, parts, *tokens, held=held, weight_T=weight_T, schedule=schedule
            )
            sparse, down_HG, found = better.ffn, ffn.rounded(better.down_HG), better.figures
        elif wanted_TH is not None:
            ridge = ridge_for(len(wanted_TH), ffn.width, recipe.refit_ridge)
            problem = (profile.h_TF, parts, run_TN, wanted_TH, down_HG)
            down_HG = ffn.rounded(refit_down(*problem, ridge=ridge))
    with clock("carved_down"):
        is_all = len(profile.h_TF) == len(run_TN) and not sparse.is_polished
        h_TF = profile.h_TF if is_all else None
        y_TH = sparse_output(sparse, down_HG, parts, run_TN, profile.x_TH, h_TF)
    return CarvedLayer(parts, router, sparse, down_HG, run_TN, y_TH, found)


def best_split(
    ffn: FFN,
    profile: Profile,
    wanted_TH: torch.Tensor,
    config: CMoEConfig,
    recipe: Recipe,
    *,
    held: int,
    weight_T: torch.Tensor | None = None,
) -> tuple[dict[int, float], Tried]:
    """Relative error on held-out tokens with none of the active experts pinned, and with all; and
    what was tried with the better one.

    Routing adapts to the token, a fixed choice suits the refit better: which of them wins differs
    from layer to layer. Where all are pinned the layer is pruned, not routed.
    """
    errors, tried = {}, {}
    top_k = min(config.num_experts_per_tok, config.num_experts - 1)
    tokens = len(wanted_TH)
    seen = min(tokens - held, PROFILED_TOKENS)  # enough to tell one from another
    has_all = seen + held == tokens
    is_final = has_all and recipe.routed_by == "router" and not recipe.polish_epochs

    def some(tensor: torch.Tensor) -> torch.Tensor:
        """Of those tokens and the ones held out; no copy of all."""
        return tensor if has_all else torch.cat([tensor[:seen], tensor[tokens - held :]])

    for pinned in (0, top_k):
        trial = replace(recipe, pinned=pinned, routed_by="router")
        if pinned == config.num_experts_per_tok:  # none of the others ever runs: any clusters do
            trial = replace(trial, max_iterations=1)
        parts, router = divide_for_router(ffn, profile, config, trial)
        x_TH, weight_S = some(profile.x_TH), None if weight_T is None else some(weight_T)
        run_TN = running_experts(router, replace(profile, x_TH=x_TH), parts, config, trial)
        problem = (run_TN, x_TH, some(wanted_TH))
        found = reconstruct(ffn, parts, *problem, held=held, weight_T=weight_S)
        errors[pinned] = found.held_out_error
        tried[pinned] = Tried(parts, router, found if is_final else None)
    return errors, tried[min(errors, key=errors.__getitem__)]


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
    row, tokens = source.architecture, streams.tokens
    hidden_TH = streams.carved_WLH.flatten(0, 1)
    attention = AttentionHalf(row, source.config, streams.length, storage.device)
    kept = min(tokens, PROFILED_TOKENS) if recipe.makes_activations_again else tokens
    sizes = (config.hidden_size, config.intermediate_size, k_act)
    profile = Profile.empty(tokens, kept, *sizes, storage.empty)
    held = held_out(len(streams.carved_WLH), streams.length)
    for index in range(first, config.num_hidden_layers):
        clock = Stopwatch()
        with clock("read"):
            ffn, rest = take_ffn(row, source.read_layer(index), config, storage.device)
            attention.load(index, rest)
        if index in (config.dense_layers or ()):
            with clock("forward"):
                for stream in streams:
                    run_dense_layer(ffn, attention, stream)
            attention.release()
            del ffn, rest
            yield index, *dense_layer(source, index, with_totals(clock.seconds, tokens))
            continue
        cosine = recipe.cosine_profile
        profile_layer(ffn, attention, streams.carved_WLH, profile, cosine=cosine, clock=clock)
        if not profile.is_finite:
            raise overflowed(index)
        wanted_TH = None
        if streams.dense_WLH is not None:
            with clock("dense_stream"):
                run_dense_layer(ffn, attention, streams.dense_WLH)
                wanted_TH = streams.dense_WLH.flatten(0, 1) - hidden_TH
        elif recipe.refit:
            with clock("dense_output"):
                wanted_TH = dense_output(ffn, profile)
        weight_T = None
        if recipe.token_weights == "residual" and wanted_TH is not None:
            weight_T = token_weights(hidden_TH + wanted_TH)
        split: dict[int, float] = {}
        tried = None
        how: dict[str, Any] = {"held": held, "weight_T": weight_T}
        if recipe.adaptive_split and wanted_TH is not None:
            with clock("split"):
                split, tried = best_split(ffn, profile, wanted_TH, config, recipe, **how)
        carved = carve_layer(ffn, profile, wanted_TH, config, recipe, clock, tried=tried, **how)
        hidden_TH += carved.y_TH
        with clock("dense_down_sample"):
            sample_TH = ffn.output(profile.h_TF[:BATCH_TOKENS])
        figures = layer_figures(carved, profile, sample_TH) | ({"split": split} if split else {})
        # Nothing of this layer may wait for the next one: weights are the largest thing in memory.
        attention.release()
        del ffn, rest, wanted_TH, how, weight_T, tried
        with clock("read"):
            dense = source.read_layer(index)
        with clock("slicing"):
            tensors = stored_tensors(row, index, dense, carved)
        figures["seconds"] = with_totals(clock.seconds, tokens)
        del dense, carved
        yield index, tensors, figures
        del tensors
