# SPDX-License-Identifier: Apache-2.0
"""Refit down projections in closed form, so that the sparse FFN does the dense one's work.

Let Z (T, R) be the hidden activations of the running neurons, zero where the neuron's expert does
not run, W (H, R) their dense down projection and Y (T, H) the target. The refit is the ridge
regression that stays near W,

    W' = argmin ||Z W'^T - Y||^2 + lambda ||W' - W||^2
       = W + [(Z^T Z + lambda I)^-1 Z^T D]^T        with D = Y - Z W^T,

so that with all experts active, where Z W^T = Y, nothing changes. `NormalEquations` sums Z^T Z and
Z^T D batch by batch. A few tokens are held out of these sums, and their Z and D kept: the error on
them, ||Z C - D|| with C = (W' - W)^T, tells which lambda is best on unseen text. Each lambda costs
one factorisation and one product, and no pass over the other tokens.

Shape suffixes: T tokens, B tokens of one batch, H hidden size, F dense FFN width, G = F, or F + 1
with an output bias, R running neurons, N routed experts.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch

from .decoder import BATCH_TOKENS
from .layer import FFN
from .linalg import add_lower_gram, solve_ridge
from .partition import Partition
from .recipe import Recipe

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Candidates of `held_out_errors`, relative to a mean squared activation."""


def ridge_for(tokens: int, width: int, ridge: float) -> float:
    """Return the ridge to use where there are fewer than the ten tokens a neuron it was tuned for.

    The best one grew with the square of the shortage, measured: a weaker one overfits.
    """
    return ridge * max(1.0, (10 * width / max(tokens, 1)) ** 2)


class Running(NamedTuple):
    """The neurons that run for some token under a routing."""

    neurons_R: torch.Tensor
    """Shared neurons, then those of the running experts, one expert after the other, int64."""
    expert_R: torch.Tensor
    """The expert of each, N for shared neurons, int64."""

    @classmethod
    def of(cls, parts: Partition, run_TN: torch.Tensor) -> Self:
        """Select the shared neurons and those of the experts that run at all."""
        experts, neurons = parts.experts_NM.shape
        experts_E = run_TN.any(dim=0).nonzero().squeeze(1)
        shared_S = parts.shared_S.to(run_TN.device)
        routed_R = parts.experts_NM.to(run_TN.device)[experts_E].flatten()
        owner_R = [torch.full_like(shared_S, experts), experts_E.repeat_interleave(neurons)]
        return cls(torch.cat([shared_S, routed_R]), torch.cat(owner_R))

    def mask_idle(self, h_BR: torch.Tensor, run_BN: torch.Tensor) -> torch.Tensor:
        """Return Z: activations of these neurons, zero where their expert does not run, (B, R)."""
        always_B1 = run_BN.new_ones(len(run_BN), 1)
        return h_BR * torch.cat([run_BN, always_B1], dim=1)[:, self.expert_R]


class Samples(NamedTuple):
    """Calibration tokens of one FFN, and what a refit aims at."""

    x_TH: torch.Tensor
    """Inputs."""
    target_TH: torch.Tensor
    """Outputs to aim at, Y."""
    weight_T: torch.Tensor
    """Factor of each token's error, see `token_weights`."""
    num_held_out: int = 0
    """How many of the last tokens choose how to fit."""

    def take(self, tokens: slice | torch.Tensor) -> Self:
        """Select some of the tokens."""
        x_TH, target_TH, weight_T, num_held_out = self
        return type(self)(x_TH[tokens], target_TH[tokens], weight_T[tokens], num_held_out)


class Batch(NamedTuple):
    """What a refit needs of a few tokens, multiplied by their weights."""

    z_BR: torch.Tensor
    """Z, with one more column, of ones, for an output bias."""
    missing_BH: torch.Tensor
    """D."""
    target_square: torch.Tensor
    """||Y||^2, a scalar."""


def batches(ffn: FFN, running: Running, run_TN: torch.Tensor, samples: Samples) -> Iterator[Batch]:
    """Yield what a refit needs, computing the hidden activations of one batch at a time."""
    down_HG = ffn.down_with_bias
    down_HR = down_HG[:, running.neurons_R]
    if ffn.is_biased:
        down_HR = torch.cat([down_HR, down_HG[:, -1:]], dim=1)
    split = (tensor.split(BATCH_TOKENS) for tensor in (run_TN, *samples[:3]))
    for run_BN, x_BH, target_BH, weight_B in zip(*split, strict=True):
        z_BR = running.mask_idle(ffn.hidden(x_BH)[:, running.neurons_R], run_BN)
        if ffn.is_biased:
            z_BR = torch.cat([z_BR, z_BR.new_ones(len(z_BR), 1)], dim=1)
        z_BR, target_BH = z_BR * weight_B[:, None], target_BH * weight_B[:, None]
        yield Batch(z_BR, target_BH - z_BR @ down_HR.T, target_BH.square().sum())


@dataclass
class NormalEquations:
    """The sums over tokens that a refit needs."""

    running: Running
    gram_RR: torch.Tensor
    """Z^T Z, float32, with one more row and column for an output bias; its lower triangle."""
    cross_RH: torch.Tensor
    """Z^T D."""

    @classmethod
    def empty(cls, ffn: FFN, running: Running) -> Self:
        """Create sums over no tokens."""
        order, hidden = len(running.neurons_R) + ffn.is_biased, len(ffn.down_HF)
        gram_RR = ffn.down_HF.new_zeros(order, order)
        return cls(running, gram_RR, ffn.down_HF.new_zeros(order, hidden))

    def add(self, batches: Iterable[Batch]) -> None:
        """Add the tokens of some batches."""
        for z_BR, missing_BH, _ in batches:
            add_lower_gram(self.gram_RR, z_BR)
            self.cross_RH += z_BR.T @ missing_BH

    def change(self, ridge: float) -> torch.Tensor:
        """Return C (R, H) with lambda = `ridge` mean squared activations."""
        if not len(self.gram_RR):  # no neuron runs
            return self.cross_RH
        return solve_ridge(self.gram_RR, self.cross_RH, ridge)

    def refit(self, down_HG: torch.Tensor, ridge: float) -> torch.Tensor:
        """Return the refitted down projection W' (H, G). Neurons that never run keep theirs."""
        change_RH, neurons_R = self.change(ridge), self.running.neurons_R
        down_HG = down_HG.clone()
        down_HG[:, neurons_R] += change_RH[: len(neurons_R)].T
        if len(change_RH) > len(neurons_R):
            down_HG[:, -1] += change_RH[-1]
        return down_HG


def held_out_errors(
    seen: NormalEquations, held_out: Sequence[Batch], ridges: Iterable[float] = RIDGES
) -> dict[float, float]:
    """Return the relative error on held-out tokens of the refit on the tokens seen, by ridge."""
    target = max(sum(batch.target_square.item() for batch in held_out), 1e-30)

    def error(change_RH: torch.Tensor) -> float:
        left = (torch.addmm(b.missing_BH, b.z_BR, change_RH, alpha=-1) for b in held_out)
        return (sum(left_BH.square().sum().item() for left_BH in left) / target) ** 0.5

    return {ridge: error(seen.change(ridge)) for ridge in ridges}


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


def token_weights(residual_TH: torch.Tensor, *, most: float = 2.0) -> torch.Tensor:
    """Return the weight of each token's error, (T,): inverse to its residual stream's length.

    The next layer normalises that stream, so an error counts by its share of it. A few tokens,
    first positions above all, are a hundred times as long as the others and would decide the least
    squares alone. The median token weighs 1, and none more than `most`.
    """
    length_T = residual_TH.norm(dim=1)
    return (length_T.median() / length_T.clamp_min(1e-30)).clamp_max(most)


def sparse_output(
    ffn: FFN,
    down_HG: torch.Tensor,
    parts: Partition,
    run_TN: torch.Tensor,
    x_TH: torch.Tensor,
    h_TF: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the output of the sparse FFN, (T, H) (paper, eq. 2).

    Its hidden activations are `h_TF`, or computed for one batch at a time.
    """
    running = Running.of(parts, run_TN)
    down_HR, y_TH = down_HG[:, running.neurons_R], torch.empty_like(x_TH)
    for start in range(0, len(x_TH), BATCH_TOKENS):
        tokens = slice(start, start + BATCH_TOKENS)
        h_BF = ffn.hidden(x_TH[tokens]) if h_TF is None else h_TF[tokens]
        z_BR = running.mask_idle(h_BF[:, running.neurons_R], run_TN[tokens])
        y_TH[tokens] = z_BR @ down_HR.T
    return y_TH + down_HG[:, -1] if ffn.is_biased else y_TH
