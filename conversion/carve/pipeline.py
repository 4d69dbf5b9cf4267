# SPDX-License-Identifier: Apache-2.0
"""The algorithm: profile, partition, route, refit, one layer at a time.

`carve_layer` reads like the paper's section 4; `carve_model` walks the layers in order, each
profiled on what the carved layers before it really produce.

Shape suffixes: W windows, L tokens of one window, T = W * L tokens, H hidden size, F dense FFN
width, N routed experts.
"""

from collections.abc import Iterator
from typing import Any

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
    with_totals,
)
from .layer import (
    FFN,
    CarvedLayer,
    Profile,
    divide_and_route,
    layer_figures,
    overflowed,
    running_experts,
    stored_tensors,
    take_ffn,
)
from .recipe import Recipe
from .reconstruct import fit_layer
from .refit import Samples, sparse_output, token_weights
from .split import best_split


def carve_layer(
    ffn: FFN,
    profile: Profile,
    samples: Samples | None,
    config: CMoEConfig,
    recipe: Recipe,
    clock: Stopwatch,
) -> CarvedLayer:
    """Turn one dense FFN into shared expert, routed experts and router (paper, section 4).

    `samples` is None for a recipe without a refit.
    """
    split = fit = None
    if recipe.adaptive_split and samples is not None:
        with clock("split"):
            split = best_split(ffn, profile, samples, config, recipe)
    with clock("partition"):
        parts, router = split[:2] if split else divide_and_route(ffn, profile, config, recipe)
    with clock("router"):
        run_TN = running_experts(router, profile, parts, config, recipe)
    with clock("refit"):
        if samples is not None:
            fit = (split and split.fit) or fit_layer(ffn, parts, run_TN, samples, recipe)
        sparse = fit.ffn if fit else ffn
        down_HG = ffn.rounded(fit.down_HG if fit else ffn.down_with_bias)
    with clock("carved_down"):
        is_known = len(profile.h_TF) == len(run_TN) and not sparse.is_polished
        h_TF = profile.h_TF if is_known else None
        y_TH = sparse_output(sparse, down_HG, parts, run_TN, profile.x_TH, h_TF)
    figures = (fit.figures if fit else {}) | ({"split": split.errors} if split else {})
    return CarvedLayer(parts, router, sparse, down_HG, run_TN, y_TH, figures)


def refit_samples(
    ffn: FFN,
    profile: Profile,
    attention: AttentionHalf,
    streams: Streams,
    recipe: Recipe,
    clock: Stopwatch,
) -> Samples | None:
    """Return what the refit aims at: hidden states of the dense model, or the dense FFN's output.

    Advances the dense stream, if there is one.
    """
    hidden_TH = streams.carved_WLH.flatten(0, 1)
    if streams.dense_WLH is not None:
        with clock("dense_stream"):
            run_dense_layer(ffn, attention, streams.dense_WLH)
            target_TH = streams.dense_WLH.flatten(0, 1) - hidden_TH
    elif recipe.refit:
        with clock("dense_output"):
            target_TH = dense_output(ffn, profile)
    else:
        return None
    weight_T = target_TH.new_ones(len(target_TH))
    if recipe.token_weights == "residual":
        weight_T = token_weights(hidden_TH + target_TH)
    num_held_out = held_out(len(streams.carved_WLH), streams.length)
    return Samples(profile.x_TH, target_TH, weight_T, num_held_out)


def load_ffn(
    source: Source, index: int, config: CMoEConfig, attention: AttentionHalf, clock: Stopwatch
) -> FFN:
    """Read layer `index`: return its FFN, and give the rest to `attention`."""
    with clock("read"):
        stored, device = source.read_layer(index), attention.position_ids.device
        ffn, rest = take_ffn(source.architecture, stored, config, device)
        attention.load(index, rest)
    return ffn


def keep_dense(
    source: Source, index: int, streams: Streams, attention: AttentionHalf, config: CMoEConfig
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Run layer `index` on all streams; return its tensors as they are, and figures."""
    clock = Stopwatch()
    ffn = load_ffn(source, index, config, attention, clock)
    with clock("forward"):
        for stream in streams:
            run_dense_layer(ffn, attention, stream)
    attention.release()
    del ffn
    prefix = source.architecture.layer_prefix.format(index)
    tensors = {prefix + name: tensor for name, tensor in source.read_layer(index).items()}
    seconds = with_totals(clock.seconds, streams.tokens)
    return tensors, {"dense": True, "relative_output_error": 0.0, "seconds": seconds}


def carve_next(
    source: Source,
    index: int,
    streams: Streams,
    attention: AttentionHalf,
    profile: Profile,
    config: CMoEConfig,
    recipe: Recipe,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Carve layer `index` and advance the streams; return the tensors to store, and figures."""
    clock, cosine = Stopwatch(), recipe.cosine_profile
    ffn = load_ffn(source, index, config, attention, clock)
    hidden_WLH = streams.carved_WLH
    if not profile_layer(ffn, attention, hidden_WLH, profile, cosine=cosine, clock=clock):
        raise overflowed(index)
    samples = refit_samples(ffn, profile, attention, streams, recipe, clock)
    carved = carve_layer(ffn, profile, samples, config, recipe, clock)
    hidden_WLH.flatten(0, 1).add_(carved.y_TH)
    with clock("dense_down_sample"):
        sample_TH = ffn.output(profile.h_TF[:BATCH_TOKENS])
    figures = layer_figures(carved, profile, sample_TH)
    # Before the layer is read again: weights are the largest thing in memory.
    attention.release()
    del ffn, samples
    with clock("read"):
        dense = source.read_layer(index)
    with clock("slicing"):
        tensors = stored_tensors(source.architecture, index, dense, carved)
    figures["seconds"] = with_totals(clock.seconds, streams.tokens)
    return tensors, figures


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

    Raises `CMoEError` if activations are not finite.
    """
    tokens = streams.tokens
    attention = AttentionHalf(source.architecture, source.config, streams.length, storage.device)
    kept = tokens if recipe.routed_by == "oracle" else min(tokens, PROFILED_TOKENS)
    # Reused by all layers: the largest thing in memory, and new pages cost time.
    profile = Profile(
        x_TH=storage.empty("inputs", tokens, config.hidden_size),
        h_TF=storage.empty("hidden", kept, config.intermediate_size),
        marks_TK=torch.empty(tokens, k_act, dtype=torch.int64),
    )
    for index in range(first, config.num_hidden_layers):
        if index in (config.dense_layers or ()):
            yield index, *keep_dense(source, index, streams, attention, config)
        else:
            yield index, *carve_next(source, index, streams, attention, profile, config, recipe)
