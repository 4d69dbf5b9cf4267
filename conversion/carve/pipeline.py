# SPDX-License-Identifier: Apache-2.0
"""The algorithm: profile, partition, route, refit, one layer at a time.

`carve_layer` is the paper's section 4; `ModelWalk` applies it to the layers of a dense model.

Shape suffixes: W windows, L tokens of one window, T = W * L tokens, H hidden size, F dense FFN
width, N routed experts.
"""

from typing import Any

import torch

from cmoe_hf import CMoEConfig

from ..device import Stopwatch
from ..source.calibration import held_out
from .decoder import (
    BATCH_TOKENS,
    PROFILED_TOKENS,
    Walk,
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


class ModelWalk(Walk):
    """Carve a dense model: each layer is profiled on what the carved ones before it produce."""

    def __post_init__(self) -> None:
        super().__post_init__()
        tokens = self.streams.tokens
        kept = tokens if self.recipe.routed_by == "oracle" else min(tokens, PROFILED_TOKENS)
        # Reused by all layers: the largest thing in memory, and new pages cost time.
        self.profile = Profile(
            x_TH=self.storage.empty("inputs", tokens, self.config.hidden_size),
            h_TF=self.storage.empty("hidden", kept, self.config.intermediate_size),
            marks_TK=torch.empty(tokens, self.k_act, dtype=torch.int64),
        )

    def carve(self, index: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Carve a layer, or run it if it stays dense; return tensors to store, and figures."""
        clock = Stopwatch()
        with clock("read"):
            stored = self.source.read_layer(index)
            ffn, rest = take_ffn(self.arch, stored, self.config, self.storage.device)
            self.attention.load(index, rest)
        carved: CarvedLayer | None = None
        figures: dict[str, Any] = {"dense": True, "relative_output_error": 0.0}
        if index in (self.config.dense_layers or ()):
            with clock("forward"):
                for stream in self.streams:
                    run_dense_layer(ffn, self.attention, stream)
        else:
            carved, figures = self.carve_ffn(index, ffn, clock)
        # Before the layer is read again: weights are the largest thing in memory.
        self.attention.release()
        del ffn, rest
        with clock("read"):
            tensors = self.source.read_layer(index)
        with clock("slicing"):
            if carved is not None:
                tensors = stored_tensors(self.arch, tensors, carved)
        prefix = self.arch.layer_prefix.format(index)
        figures["seconds"] = with_totals(clock.seconds, self.streams.tokens)
        return {prefix + name: tensor for name, tensor in tensors.items()}, figures

    def carve_ffn(
        self, index: int, ffn: FFN, clock: Stopwatch
    ) -> tuple[CarvedLayer, dict[str, Any]]:
        """Profile and carve the FFN of a layer, and add its output to the carved stream."""
        hidden_WLH, profile, recipe = self.streams.carved_WLH, self.profile, self.recipe
        cosine = recipe.cosine_profile
        if not profile_layer(ffn, self.attention, hidden_WLH, profile, cosine=cosine, clock=clock):
            raise overflowed(index)
        carved = carve_layer(ffn, profile, self.samples(ffn, clock), self.config, recipe, clock)
        hidden_WLH.flatten(0, 1).add_(carved.y_TH)
        with clock("dense_down_sample"):
            sample_TH = ffn.output(profile.h_TF[:BATCH_TOKENS])
        return carved, layer_figures(carved, profile, sample_TH)

    def samples(self, ffn: FFN, clock: Stopwatch) -> Samples | None:
        """Return what a refit aims at: the dense model's hidden states, or the dense FFN's output.

        Advances the dense stream, if there is one.
        """
        hidden_TH, dense_WLH = self.streams.carved_WLH.flatten(0, 1), self.streams.dense_WLH
        if dense_WLH is not None:
            with clock("dense_stream"):
                run_dense_layer(ffn, self.attention, dense_WLH)
                target_TH = dense_WLH.flatten(0, 1) - hidden_TH
        elif self.recipe.refit:
            with clock("dense_output"):
                target_TH = dense_output(ffn, self.profile)
        else:
            return None
        weight_T = target_TH.new_ones(len(target_TH))
        if self.recipe.token_weights == "residual":
            weight_T = token_weights(hidden_TH + target_TH)
        num_held_out = held_out(len(self.streams.carved_WLH), self.streams.length)
        return Samples(self.profile.x_TH, target_TH, weight_T, num_held_out)
