# SPDX-License-Identifier: Apache-2.0
"""Refit a carved FFN, with the ridge that held-out tokens choose.

The refit that they judge has not seen them; the last one sees all tokens. Hidden activations exist
for one batch of tokens at a time.

Shape suffixes: T tokens, H hidden size, N routed experts, G dense FFN width, plus 1 with an output
bias.
"""

from typing import Any, NamedTuple

import torch

from .layer import FFN
from .partition import Partition
from .recipe import Recipe
from .refit import NormalEquations, Running, Samples, batches, held_out_errors, ridge_for


class Reconstruction(NamedTuple):
    """A refit and how it was found."""

    down_HG: torch.Tensor
    """The refitted down projection, float32, in the dense order of neurons."""
    ridge: float
    refit_errors: dict[float, float]
    """Relative error on the held-out tokens for each ridge tried."""

    @property
    def held_out_error(self) -> float:
        """Return the least relative error on tokens that the weights have not seen."""
        return min(self.refit_errors.values())

    @property
    def figures(self) -> dict[str, Any]:
        """Return the entries of `conversion.json`."""
        if not self.refit_errors:
            return {}
        return {"ridge": self.ridge, "held_out_error": self.held_out_error}


def reconstruct(
    ffn: FFN,
    parts: Partition,
    run_TN: torch.Tensor,
    samples: Samples,
    *,
    ridge: float | None = None,
) -> Reconstruction:
    """Refit one carved FFN.

    Needs two square matrices of the number of running neurons, in float32.

    Args:
        ffn: The dense FFN.
        parts: The neurons of each expert.
        run_TN: True where a routed expert runs.
        samples: What to fit.
        ridge: Lambda relative to a mean squared activation, idle neurons included; the held-out
            tokens choose it if None, and without any it is the strongest.
    """
    running, down_HG = Running.of(parts, run_TN), ffn.down_with_bias
    equations = NormalEquations.empty(ffn, running)
    if ridge is not None:
        equations.add(batches(ffn, running, run_TN, samples))
        ridge *= len(equations.gram_RR) / down_HG.shape[1]
        return Reconstruction(equations.refit(down_HG, ridge), ridge, {})
    cut = len(run_TN) - samples.num_held_out
    seen, unseen = slice(cut), slice(cut, None)
    equations.add(batches(ffn, running, run_TN[seen], samples.take(seen)))
    held_out = list(batches(ffn, running, run_TN[unseen], samples.take(unseen)))
    errors = held_out_errors(equations, held_out)
    ridge = min(sorted(errors, reverse=True), key=errors.__getitem__)
    equations.add(held_out)
    del held_out
    return Reconstruction(equations.refit(down_HG, ridge), ridge, errors)


def fit_layer(
    ffn: FFN, parts: Partition, run_TN: torch.Tensor, samples: Samples, recipe: Recipe
) -> Reconstruction:
    """Refit one carved FFN as the recipe says."""
    ridge = None
    if not recipe.held_out_ridge:
        ridge = ridge_for(len(run_TN), ffn.width, recipe.refit_ridge)
    return reconstruct(ffn, parts, run_TN, samples, ridge=ridge)
