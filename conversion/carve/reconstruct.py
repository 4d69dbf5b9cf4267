# SPDX-License-Identifier: Apache-2.0
"""Weights of a carved FFN that bring its output near the one wanted: refit, polish, refit.

The first refit sees all tokens but those held out. They choose its ridge, and the epoch at which
the polish stops. The last refit starts from the polished weights and sees all tokens. Hidden
activations exist for one batch of tokens at a time: only what enters the FFN and what should leave
it is kept for all.

Shape suffixes: T tokens, B tokens of one batch, H hidden size, F dense FFN width, G = F, or F + 1
with an output bias, N routed experts.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from .decoder import BATCH_TOKENS
from .layer import FFN
from .partition import Partition
from .polish import Schedule, polish
from .refit import Batch, NormalEquations, Running, held_out_errors, refitted


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
        """The least relative error on the held-out tokens, of weights that have not seen them."""
        return min([*self.refit_errors.values(), *self.polish_errors])

    @property
    def figures(self) -> dict[str, Any]:
        """What `conversion.json` says."""
        return {
            "ridge": self.ridge,
            "held_out_error": self.held_out_error,
            "polish_errors": self.polish_errors,
        }


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
    """Refit and polish one carved FFN.

    Args:
        ffn: The dense FFN.
        parts: Whose neurons are whose.
        run_TN: True where a routed expert runs.
        x_TH: Inputs of the FFN.
        wanted_TH: The output wanted.
        held: So many of the last tokens choose ridge and epoch, not all; without any the ridge is
            the strongest and there is no polish.
        weight_T: What a token's error is multiplied by, 1 if None; see `refit.token_weights`.
        schedule: Of the polish; None for a refit alone.
        seed: Of the polish.

    Needs two square matrices of the number of running neurons, in float32.
    """
    running, cut = Running.of(parts, run_TN), len(x_TH) - held
    weight_T = x_TH.new_ones(len(x_TH)) if weight_T is None else weight_T
    tokens = (run_TN, x_TH, wanted_TH, weight_T)
    dense_HG = ffn.down_with_bias
    seen = NormalEquations.empty(running, len(dense_HG), biased=ffn.is_biased)
    seen.add(batches(ffn, dense_HG, running, *(tensor[:cut] for tensor in tokens)))
    unseen = list(batches(ffn, dense_HG, running, *(tensor[cut:] for tensor in tokens)))
    refit_errors = held_out_errors(seen, unseen)
    ridge = min(sorted(refit_errors, reverse=True), key=refit_errors.__getitem__)
    polish_errors: list[float] = []
    is_polishing = schedule is not None and held > 0
    start_HG = refitted(seen, dense_HG, ridge) if is_polishing else dense_HG
    seen.add(unseen)
    del unseen
    if is_polishing:
        how: dict[str, Any] = {"held": held, "weight_T": weight_T, "schedule": schedule}
        polished = polish(ffn, start_HG, parts, *tokens[:3], seed=seed, **how)
        polish_errors = polished.errors
    if not polish_errors or min(polish_errors) == polish_errors[0]:
        down_HG = refitted(seen, dense_HG, ridge)
        return Reconstruction(ffn, down_HG, ridge, refit_errors, polish_errors)
    del seen
    ffn = replace(
        ffn,
        gate_FH=None if polished.gate_FH is None else ffn.rounded(polished.gate_FH),
        up_FH=ffn.rounded(polished.up_FH),
        is_polished=True,
    )
    last = NormalEquations.empty(running, len(dense_HG), biased=ffn.is_biased)
    last.add(batches(ffn, polished.down_HG, running, *tokens))
    down_HG = refitted(last, polished.down_HG, ridge)
    return Reconstruction(ffn, down_HG, ridge, refit_errors, polish_errors)


def batches(
    ffn: FFN,
    down_HG: torch.Tensor,
    running: Running,
    run_TN: torch.Tensor,
    x_TH: torch.Tensor,
    wanted_TH: torch.Tensor,
    weight_T: torch.Tensor,
) -> Iterator[Batch]:
    """What a refit needs of some tokens, `BATCH_TOKENS` at a time."""
    split = (tensor.split(BATCH_TOKENS) for tensor in (x_TH, run_TN, wanted_TH, weight_T))
    for x_BH, run_BN, wanted_BH, weight_B in zip(*split, strict=True):
        yield Batch.of(running, ffn.hidden(x_BH), run_BN, wanted_BH, down_HG, weight_B)
