# SPDX-License-Identifier: Apache-2.0
"""Refit down projections in closed form, so that the sparse FFN does the dense one's work.

Let Z (T, R) be the hidden activations of the running neurons, zero where the neuron's expert does
not run, W (H, R) their dense down projection and Y (T, H) the target. The refit is the ridge
regression that stays near W,

    W' = argmin ||Z W'^T - Y||^2 + lambda ||W' - W||^2
       = W + [(Z^T Z + lambda I)^-1 Z^T D]^T        with D = Y - Z W^T,

so that with all experts active, where Z W^T = Y, nothing changes. `NormalEquations` sums Z^T Z and
Z^T D batch by batch. A few tokens are held out of these sums, and their Z and D kept: the error on
them, ||Z C - D|| with C = (W' - W)^T, tells which lambda is best on text that the refit has not
learnt. One lambda tried so costs one factorisation and one product, and no pass over the others.

Shape suffixes: T tokens, B tokens of one batch, H hidden size, F dense FFN width, G = F, or F + 1
with an output bias, R running neurons, E running experts, N routed experts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch

from .linalg import solve_shifted, strips
from .partition import Partition

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""What `held_out_errors` tries, relative to a mean squared activation."""


def ridge_for(tokens: int, width: int, ridge: float) -> float:
    """The ridge where a neuron has fewer tokens than the ten that `ridge` was tuned for.

    It grows with the square of what is missing, as the best one did, measured: otherwise the refit
    would learn the calibration text by heart.
    """
    return ridge * max(1.0, (10 * width / max(tokens, 1)) ** 2)


class Running(NamedTuple):
    """The neurons that run for some token, the shared ones first, and which of them when."""

    neurons_R: torch.Tensor
    """Shared neurons, then those of the running experts, one expert after the other, int64."""
    shared: int
    """How many of them are shared."""
    experts_E: torch.Tensor
    """Experts that run for some token, ascending, int64."""

    @classmethod
    def of(cls, parts: Partition, run_TN: torch.Tensor) -> Self:
        """Those of a partition under some routing."""
        experts_E = run_TN.any(dim=0).nonzero().squeeze(1)
        routed_R = parts.experts_NM.to(run_TN.device)[experts_E].flatten()
        neurons_R = torch.cat([parts.shared_S.to(run_TN.device), routed_R])
        return cls(neurons_R, len(parts.shared_S), experts_E)

    def idle_zeroed(self, h_BR: torch.Tensor, run_BN: torch.Tensor) -> torch.Tensor:
        """Z: activations of these neurons, zero where their expert does not run, (B, R)."""
        shared_BR, routed_BR = h_BR.split([self.shared, h_BR.shape[1] - self.shared], dim=1)
        if not len(self.experts_E):
            return shared_BR
        mask_BE = run_BN[:, self.experts_E]
        width = routed_BR.shape[1] // len(self.experts_E)
        return torch.cat([shared_BR, routed_BR * mask_BE.repeat_interleave(width, dim=1)], dim=1)


class Batch(NamedTuple):
    """What a refit needs of a few tokens, multiplied by their weights."""

    z_BR: torch.Tensor
    """Z, with one more column, of ones, for an output bias."""
    missing_BH: torch.Tensor
    """D."""
    wanted: torch.Tensor
    """||Y||^2, a scalar."""

    @classmethod
    def of(
        cls,
        running: Running,
        h_BF: torch.Tensor,
        run_BN: torch.Tensor,
        wanted_BH: torch.Tensor,
        down_HG: torch.Tensor,
        weight_B: torch.Tensor | None = None,
    ) -> Self:
        """Of hidden activations; each error has a weight (not squared), 1 if None."""
        z_BR = running.idle_zeroed(h_BF[:, running.neurons_R], run_BN)
        down_HR = down_HG[:, running.neurons_R]
        if down_HG.shape[1] > h_BF.shape[1]:
            z_BR = torch.cat([z_BR, z_BR.new_ones(len(z_BR), 1)], dim=1)
            down_HR = torch.cat([down_HR, down_HG[:, -1:]], dim=1)
        if weight_B is not None:
            z_BR, wanted_BH = z_BR * weight_B[:, None], wanted_BH * weight_B[:, None]
        return cls(z_BR, wanted_BH - z_BR @ down_HR.T, wanted_BH.square().sum())


@dataclass
class NormalEquations:
    """What a refit needs of any number of tokens, summed batch by batch."""

    running: Running
    """Whose neurons the equations are for."""
    gram_RR: torch.Tensor
    """Z^T Z, float32, with one more row and column for an output bias; its lower triangle."""
    cross_RH: torch.Tensor
    """Z^T D."""

    @classmethod
    def empty(cls, running: Running, hidden: int, *, biased: bool = False) -> Self:
        """Sums over no tokens."""
        order, device = len(running.neurons_R) + biased, running.neurons_R.device
        gram_RR = torch.zeros(order, order, device=device)
        return cls(running, gram_RR, torch.zeros(order, hidden, device=device))

    def add(self, batches: Iterable[Batch]) -> None:
        """Add some tokens."""
        for z_BR, missing_BH, _ in batches:
            for rows in strips(len(self.gram_RR)):
                self.gram_RR[rows, : rows.stop] += z_BR[:, rows].T @ z_BR[:, : rows.stop]
            self.cross_RH += z_BR.T @ missing_BH

    def change(self, ridge: float) -> torch.Tensor:
        """C, the change of the refit with lambda = `ridge` mean squared activations, (R, H)."""
        shift = max(ridge * self.gram_RR.diagonal().mean().item(), 1e-30)
        return solve_shifted(self.gram_RR, self.cross_RH, shift)


def held_out_errors(
    seen: NormalEquations, held: Sequence[Batch], ridges: Iterable[float] = RIDGES
) -> dict[float, float]:
    """Relative error on the tokens held out of the refit on the tokens seen, for each ridge."""
    wanted = max(sum(batch.wanted.item() for batch in held), 1e-30)

    def error(change_RH: torch.Tensor) -> float:
        left = (torch.addmm(b.missing_BH, b.z_BR, change_RH, alpha=-1) for b in held)
        return (sum(left_BH.square().sum().item() for left_BH in left) / wanted) ** 0.5

    return {ridge: error(seen.change(ridge)) for ridge in ridges}


def refitted(equations: NormalEquations, down_HG: torch.Tensor, ridge: float) -> torch.Tensor:
    """The refitted down projection W' (H, G). Neurons that never run keep their weights."""
    change_RH, running = equations.change(ridge), equations.running
    down_HG = down_HG.clone()
    down_HG[:, running.neurons_R] += change_RH[: len(running.neurons_R)].T
    if len(change_RH) > len(running.neurons_R):
        down_HG[:, -1] += change_RH[-1]
    return down_HG


def refit_down(
    h_TF: torch.Tensor,
    parts: Partition,
    run_TN: torch.Tensor,
    target_TH: torch.Tensor,
    down_HG: torch.Tensor,
    *,
    ridge: float,
) -> torch.Tensor:
    """Return the refitted down projection W' (H, G) of tokens whose activations are all there.

    Args:
        h_TF: Hidden activations of the dense FFN.
        parts: Neurons of the experts.
        run_TN: True where a routed expert runs.
        target_TH: Y.
        down_HG: W, with the output bias as its last column if there is one.
        ridge: lambda, relative to the mean square of all activations.

    Raises `CMoEError` if the system cannot be solved.
    """
    running, columns = Running.of(parts, run_TN), down_HG.shape[1]
    equations = NormalEquations.empty(running, len(down_HG), biased=columns > h_TF.shape[1])
    if not len(equations.gram_RR):
        return down_HG.clone()
    equations.add([Batch.of(running, h_TF, run_TN, target_TH, down_HG)])
    return refitted(equations, down_HG, ridge * len(equations.gram_RR) / columns)


def token_weights(residual_TH: torch.Tensor, *, most: float = 2.0) -> torch.Tensor:
    """What the error of each token is worth, (T,): inverse to the length of its residual stream.

    The next layer normalises that stream, so an error counts by its share of it. A few tokens,
    first positions above all, are a hundred times as long as the others and would decide the least
    squares alone. Relative to the median token; none counts more than `most`.
    """
    length_T = residual_TH.norm(dim=1)
    return (length_T.median() / length_T.clamp_min(1e-30)).clamp_max(most)
