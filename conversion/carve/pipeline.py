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
from ..source.checkpoint import PROOF_TOKENS
from ..source.ffn import overflowed, prove
from .decoder import (
    BATCH_TOKENS,
    PROFILED_TOKENS,
    Walk,
    attend,
    dense_output,
    profile_layer,
    run_dense_layer,
    run_layer,
    with_totals,
)
from .layer import (
    FFN,
    CarvedLayer,
    Profile,
    divide_and_route,
    layer_figures,
    running_experts,
    stored_tensors,
    take_ffn,
)
from .proof import AllActive
from .recipe import Recipe
from .refit import Samples, fit_layer, sparse_output, token_weights
from .split import best_split
from .tail import Tail


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
        down_HG = ffn.rounded(fit.down_HG if fit else ffn.down_with_bias)
    with clock("carved_down"):
        h_TF = profile.h_TF if len(profile.h_TF) == len(run_TN) else None
        y_TH = sparse_output(ffn, down_HG, parts, run_TN, profile.x_TH, h_TF)
    figures = (fit.figures if fit else {}) | ({"split": split.errors} if split else {})
    return CarvedLayer(parts, router, down_HG, run_TN, y_TH, figures)


class ModelWalk(Walk):
    """Carve a dense model: each layer is profiled on what the carved ones before it produce."""

    def __post_init__(self) -> None:
        super().__post_init__()
        tokens, carved_WLH = self.streams.tokens, self.streams.carved_WLH
        kept = tokens if self.recipe.routed_by == "oracle" else min(tokens, PROFILED_TOKENS)
        # Reused by all layers: the largest thing in memory, and new pages cost time.
        self.profile = Profile(
            x_TH=self.storage.empty("inputs", tokens, self.config.hidden_size),
            h_TF=self.storage.empty("hidden", kept, self.config.ffn_width),
            marks_TK=torch.empty(tokens, self.k_act, dtype=torch.int64),
        )
        self.adds = self.arch.ffn.adds
        self.residual_WLH = carved_WLH  # the streams' own, where y is just added to it
        if not self.adds:
            self.residual_WLH = self.storage.empty("residual", *carved_WLH.shape)
        self.blocks = AllActive(self.arch, self.config, self.layers)

    def carve(self, index: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Carve a layer, or run it if it stays dense; return tensors to store, and figures."""
        clock = Stopwatch()
        with clock("read"):
            stored = self.source.read_layer(index)
            ffn, layer = take_ffn(self.arch, stored, self.storage.device)
            self.layers.load(index, layer)
        with clock("proof"):
            entering_BLH = self.streams.carved_WLH[:1, :PROOF_TOKENS].clone()
            leaving_BLH = prove(self.layers, self.arch.ffn, entering_BLH)
            self.layers.replace_ffn(self.arch.ffn.place)
        carved: CarvedLayer | None = None
        figures: dict[str, Any] = {"dense": True, "relative_output_error": 0.0}
        if index in (self.config.dense_layers or ()):
            with clock("forward"):
                for stream in self.streams:
                    run_dense_layer(ffn, self.layers, stream)
        else:
            carved, figures = self.carve_ffn(index, ffn, clock)
        # Before the layer is read again: weights are the largest thing in memory.
        self.layers.release()
        del ffn, layer
        with clock("read"):
            tensors = self.source.read_layer(index)
        if carved is not None:
            with clock("proof"):
                whole = stored_tensors(self.arch, tensors, carved, refitted=False)
                self.blocks.check(index, whole, entering_BLH, leaving_BLH)
                del whole
            with clock("slicing"):
                tensors = stored_tensors(self.arch, tensors, carved)
        prefix = self.arch.layer_prefix.format(index)
        figures["seconds"] = with_totals(clock.seconds, self.streams.tokens)
        return {prefix + name: tensor for name, tensor in tensors.items()}, figures

    def carve_ffn(
        self, index: int, ffn: FFN, clock: Stopwatch
    ) -> tuple[CarvedLayer, dict[str, Any]]:
        """Profile and carve the FFN of a layer, and advance the carved stream."""
        hidden_WLH, profile, recipe = self.streams.carved_WLH, self.profile, self.recipe
        inputs = attend(self.layers, hidden_WLH, self.residual_WLH)
        if not profile_layer(ffn, inputs, profile, cosine=recipe.cosine_profile, clock=clock):
            raise overflowed(index)
        carved = carve_layer(ffn, profile, self.samples(ffn, clock), self.config, recipe, clock)
        if self.adds:
            hidden_WLH.flatten(0, 1).add_(carved.y_TH)
        else:
            with clock("tail"):
                run_layer(self.layers, hidden_WLH, lambda tokens, _: carved.y_TH[tokens])
        with clock("dense_down_sample"):
            sample_TH = ffn.output(profile.h_TF[:BATCH_TOKENS])
        return carved, layer_figures(carved, profile, sample_TH)

    def samples(self, ffn: FFN, clock: Stopwatch) -> Samples | None:
        """Return what a refit aims at: the dense model's hidden states, or the dense FFN's output.

        Advances the dense stream, if there is one.
        """
        residual_TH, dense_WLH = self.residual_WLH.flatten(0, 1), self.streams.dense_WLH
        factor_T = None
        if dense_WLH is not None:
            with clock("dense_stream"):
                run_dense_layer(ffn, self.layers, dense_WLH)
                target_TH = dense_WLH.flatten(0, 1) - residual_TH
            reached_TH = residual_TH + target_TH
            if not self.adds:
                with clock("tail"):
                    target_TH, factor_T = self.before_tail(ffn, target_TH)
        elif self.recipe.refit:
            with clock("dense_output"):
                target_TH = dense_output(ffn, self.profile)
                reached_TH = residual_TH + target_TH
        else:
            return None
        weight_T = target_TH.new_ones(len(target_TH))
        if self.recipe.token_weights == "residual":
            weight_T = token_weights(reached_TH)
        if factor_T is not None:
            weight_T = weight_T * factor_T
        num_held_out = held_out(len(self.streams.carved_WLH), self.streams.length)
        return Samples(self.profile.x_TH, target_TH, weight_T, num_held_out)

    def before_tail(self, ffn: FFN, target_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the FFN output of which the layer makes the target, (T, H), and weights, (T,)."""
        y_TH, out_WLH = dense_output(ffn, self.profile), self.streams.carved_WLH.clone()
        run_layer(self.layers, out_WLH, lambda tokens, _: y_TH[tokens])
        added_TH = (out_WLH - self.residual_WLH).flatten(0, 1)
        tail = Tail.measured(y_TH, added_TH)
        factor_T = tail.token_T.abs()
        return tail.aim(y_TH, added_TH, target_TH), factor_T / factor_T.median()
