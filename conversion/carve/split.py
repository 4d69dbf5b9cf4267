# SPDX-License-Identifier: Apache-2.0
"""Decide for one layer which of its active experts are always on, on held-out tokens.

Shape suffixes: T tokens, H hidden size, N routed experts.
"""

from dataclasses import replace
from typing import NamedTuple

import torch

from cmoe_hf import CMoEConfig

from .decoder import PROFILED_TOKENS
from .layer import FFN, Profile, divide_and_route, running_experts
from .partition import Partition
from .recipe import Recipe
from .refit import Reconstruction, Samples, reconstruct


class Split(NamedTuple):
    """A division of the active experts into those always on and those routed."""

    parts: Partition
    router: dict[str, torch.Tensor]
    errors: dict[int, float]
    """Relative error on held-out tokens, by the number of experts always on."""
    fit: Reconstruction | None
    """The refit, if it is of all tokens and final."""


def best_split(
    ffn: FFN, profile: Profile, samples: Samples, config: CMoEConfig, recipe: Recipe
) -> Split:
    """Try none of the active experts always on, and all; return the better on held-out tokens.

    Routing adapts to the token, a fixed choice suits the refit better: which of them wins differs
    from layer to layer. Where all are always on the layer is pruned, not routed.
    """
    tokens, num_held_out = len(samples.x_TH), samples.num_held_out
    seen = min(tokens - num_held_out, PROFILED_TOKENS)  # enough to tell one from the other
    has_all = seen + num_held_out == tokens
    is_final = has_all and recipe.routed_by == "router"
    if not has_all:
        unseen = torch.arange(tokens - num_held_out, tokens)
        samples = samples.take(torch.cat([torch.arange(seen), unseen]))
    sampled = profile._replace(x_TH=samples.x_TH)
    errors: dict[int, float] = {}
    splits: dict[int, Split] = {}
    for always_on in sorted({0, min(config.num_experts_per_tok, config.num_experts - 1)}):
        trial = replace(recipe, always_on=always_on, routed_by="router")
        if always_on == config.num_experts_per_tok:  # the others never run: any clusters will do
            trial = replace(trial, max_iterations=1)
        parts, router = divide_and_route(ffn, profile, config, trial)
        run_TN = running_experts(router, sampled, parts, config, trial)
        fit = reconstruct(ffn, parts, run_TN, samples)
        errors[always_on] = fit.held_out_error
        splits[always_on] = Split(parts, router, errors, fit if is_final else None)
    return splits[min(errors, key=errors.__getitem__)]
