# SPDX-License-Identifier: Apache-2.0
"""Fit a carved FFN to the target output: refit, polish, refit.

The first refit sees all tokens but those held out, which choose its ridge and the epoch at which
the polish stops. The last refit starts from the polished weights and sees all tokens. Hidden
activations exist for one batch of tokens at a time.

Shape suffixes: T tokens, H hidden size, N routed experts, G dense FFN width, plus 1 with an output
bias.
"""

from typing import Any, NamedTuple

import torch

from .layer import FFN
from .partition import Partition
from .polish import Schedule, polish
from .recipe import Recipe
from .refit import NormalEquations, Running, Samples, batches, held_out_errors, ridge_for


class Reconstruction(NamedTuple):
    """The weights and how they were found."""

    ffn: FFN
    """With polished gate and up weights, or as it was; as they will be stored."""
    down_HG: torch.Tensor
    """The refitted down projection, float32, in the dense order of neurons."""
    ridge: float
    """The best ridge on the held-out tokens."""
    refit_errors: dict[float, float]
    """Relative error on the held-out tokens for each ridge tried."""
    polish_errors: list[float]
    """The same before the polish and after each of its epochs; empty without one."""

    @property
    def held_out_error(self) -> float:
        """Return the least relative error on tokens that the weights have not seen."""
        return min([*self.refit_errors.values(), *self.polish_errors])

    @property
    def figures(self) -> dict[str, Any]:
        """Return the entries of `conversion.json`."""
        figures = ("ridge", "held_out_error", "polish_errors")
        return {name: getattr(self, name) for name in figures} if self.refit_errors else {}


def reconstruct(
    ffn: FFN,
    parts: Partition,
    run_TN: torch.Tensor,
    samples: Samples,
    *,
    ridge: float | None = None,
    schedule: Schedule | None = None,
    seed: int = 0,
) -> Reconstruction:
    """Refit and polish one carved FFN.

    Needs two square matrices of the number of running neurons, in float32.

    Args:
        ffn: The dense FFN.
        parts: The neurons of each expert.
        run_TN: True where a routed expert runs.
        samples: What to fit.
        ridge: Lambda relative to a mean squared activation, idle neurons included; the held-out
            tokens choose it if None, and without any it is the strongest.
        schedule: Of the polish, which needs held-out tokens; None for a refit alone.
        seed: Of the polish.
    """
    running, down_HG = Running.of(parts, run_TN), ffn.down_with_bias
    equations = NormalEquations.empty(ffn, running)
    if ridge is not None:
        equations.add(batches(ffn, down_HG, running, run_TN, samples))
        ridge *= len(equations.gram_RR) / down_HG.shape[1]
        return Reconstruction(ffn, equations.refit(down_HG, ridge), ridge, {}, [])
    cut = len(run_TN) - samples.num_held_out
    seen, unseen = slice(cut), slice(cut, None)
    equations.add(batches(ffn, down_HG, running, run_TN[seen], samples.take(seen)))
    held_out = list(batches(ffn, down_HG, running, run_TN[unseen], samples.take(unseen)))
    refit_errors = held_out_errors(equations, held_out)
    ridge = min(sorted(refit_errors, reverse=True), key=refit_errors.__getitem__)
    polishes = schedule is not None and samples.num_held_out > 0
    start_HG = equations.refit(down_HG, ridge) if polishes else down_HG
    equations.add(held_out)
    del held_out
    errors: list[float] = []
    if polishes:
        polished = polish(ffn, start_HG, parts, run_TN, samples, schedule=schedule, seed=seed)
        errors = polished.errors
        if min(errors) < errors[0]:
            ffn, down_HG = polished.ffn, polished.down_HG
            del equations  # before there are others
            equations = NormalEquations.empty(ffn, running)
            equations.add(batches(ffn, down_HG, running, run_TN, samples))
    return Reconstruction(ffn, equations.refit(down_HG, ridge), ridge, refit_errors, errors)


def fit_layer(
    ffn: FFN, parts: Partition, run_TN: torch.Tensor, samples: Samples, recipe: Recipe
) -> Reconstruction:
    """Refit and polish one carved FFN as the recipe says."""
    schedule = Schedule(epochs=recipe.polish_epochs) if recipe.polish_epochs else None
    ridge = None
    if not recipe.held_out_ridge:
        ridge = ridge_for(len(run_TN), ffn.width, recipe.refit_ridge)
    return reconstruct(ffn, parts, run_TN, samples, ridge=ridge, schedule=schedule)
