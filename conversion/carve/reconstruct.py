# SPDX-License-Identifier: Apache-2.0
"""Weights of a carved FFN that bring its output near the one wanted: refit, polish, refit.

The first refit sees all tokens but those held out. They choose its ridge, and the epoch at which
the polish stops. The last refit starts from the polished weights and sees all tokens. Hidden
activations exist for one batch of tokens at a time: only what enters the FFN and what should leave
it is kept for all.

Shape suffixes: T tokens, B tokens of one batch, H hidden size, F dense FFN width, G = F, or F + 1
with an output bias, N routed experts.
"""

from dataclasses import replace
from typing import NamedTuple

import torch

from .decoder import BATCH_TOKENS, FFN
from .partition import Partition
from .polish import Polished, Schedule, polish
from .refit import NormalEquations, Running, held_out_errors, refitted


class Reconstruction(NamedTuple):
    """The weights, float32, in the dense order of neurons, and how they were found."""

    gate_FH: torch.Tensor | None
    up_FH: torch.Tensor
    down_HG: torch.Tensor
    ridge: float
    """The best ridge on the held-out tokens."""
    refit_errors: dict[float, float]
    """Relative error on the held-out tokens for each ridge tried."""
    polish_errors: list[float]
    """The same before the polish and after each of its epochs; empty without one."""

    @property
    def held_out_error(self) -> float:
        """The least relative error on the held-out tokens, of weights that have not seen them."""
        return min([*self.refit_errors.values(), *self.polish_errors])


def reconstruct(
    ffn: FFN,
    parts: Partition,
    run_TN: torch.Tensor,
    x_TH: torch.Tensor,
    wanted_TH: torch.Tensor,
    *,
    held: int,
    weight_T: torch.Tensor | None = None,
    schedule: Schedule | None = None,
    seed: int = 0,
) -> Reconstruction:
    """Refit and, with a `schedule`, polish one carved FFN.

    Args:
        ffn: The dense FFN.
        parts: Whose neurons are whose.
        run_TN: True where a routed expert runs.
        x_TH: Inputs of the FFN.
        wanted_TH: The output wanted.
        held: So many of the last tokens choose ridge and epoch. At least 1, and not all.
        weight_T: What a token's error is multiplied by, 1 if None; see `refit.token_weights`.
        schedule: Of the polish; None for a refit alone.
        seed: Of the polish.

    Needs four square matrices of the number of running neurons, in float32.
    """
    running, cut = Running.of(parts, run_TN), len(x_TH) - held
    weight_T = x_TH.new_ones(len(x_TH)) if weight_T is None else weight_T
    tokens = (run_TN, x_TH, wanted_TH, weight_T)
    dense_HG = ffn.down_with_bias
    seen = equations_of(ffn, dense_HG, running, *(tensor[:cut] for tensor in tokens))
    unseen = equations_of(ffn, dense_HG, running, *(tensor[cut:] for tensor in tokens))
    refit_errors = held_out_errors(seen, unseen)
    ridge = min(refit_errors, key=refit_errors.__getitem__)
    if schedule is not None:
        start_HG = refitted(seen, dense_HG, ridge)
        polished = polish(
            ffn, start_HG, parts, run_TN, x_TH, wanted_TH,
            held=held, schedule=schedule, weight_T=weight_T, seed=seed,
        )  # fmt: skip
        if min(polished.errors) < polished.errors[0]:
            better = with_weights(ffn, polished)
            last = equations_of(better, polished.down_HG, running, *tokens)
            down_HG = refitted(last, polished.down_HG, ridge)
            return Reconstruction(
                polished.gate_FH, polished.up_FH, down_HG, ridge, refit_errors, polished.errors
            )
    down_HG = refitted(seen + unseen, dense_HG, ridge)
    return Reconstruction(ffn.gate_FH, ffn.up_FH, down_HG, ridge, refit_errors, [])


def with_weights(ffn: FFN, polished: Polished) -> FFN:
    """The FFN with polished gate and up weights."""
    return replace(ffn, gate_FH=polished.gate_FH, up_FH=polished.up_FH)


def equations_of(
    ffn: FFN,
    down_HG: torch.Tensor,
    running: Running,
    run_TN: torch.Tensor,
    x_TH: torch.Tensor,
    wanted_TH: torch.Tensor,
    weight_T: torch.Tensor,
) -> NormalEquations:
    """Normal equations of some tokens, their hidden activations made batch by batch."""
    sums = NormalEquations.empty(running, len(down_HG), biased=ffn.is_biased)
    batches = zip(
        *(tensor.split(BATCH_TOKENS) for tensor in (x_TH, run_TN, wanted_TH, weight_T)), strict=True
    )
    for x_BH, run_BN, wanted_BH, weight_B in batches:
        sums.add(ffn.hidden(x_BH), run_BN, wanted_BH, down_HG, weight_B)
    return sums
