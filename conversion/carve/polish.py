# SPDX-License-Identifier: Apache-2.0
"""Layer-local reconstruction: gradient descent on one carved FFN, the router left as it is.

A refit moves the down projection alone, in closed form. What is left of the error lies with the
neurons that still run: they were trained to share the work with those that idle now. `polish`
trains their gate, up and down weights by Adam towards the output that the refit aimed at. It needs
the calibration tokens only: no labels, and no gradient leaves the layer.

Everything that is random comes from one generator, so the same input gives the same bytes.

Shape suffixes: T tokens, B tokens of one mini-batch, H hidden size, F dense FFN width, G = F, or
F + 1 with an output bias, R running neurons, N routed experts.
"""

import math
from typing import NamedTuple

import torch

from .decoder import BATCH_TOKENS
from .layer import FFN
from .partition import Partition
from .refit import Running


class Schedule(NamedTuple):
    """How long and how fast."""

    epochs: int = 3
    """Passes over the training tokens at most."""
    rate: float = 0.01
    """Peak step of Adam, relative to the root mean square of each matrix."""
    batch: int = 256
    """Tokens of one step."""
    warm_up: float = 0.05
    """Share of the steps in which the rate rises to its peak, before it falls as a cosine."""
    patience: int = 1
    """Epochs without a new best on the held-out tokens after which it stops."""


class Polished(NamedTuple):
    """The weights that did best on the held-out tokens, float32, in the dense order of neurons."""

    gate_FH: torch.Tensor | None
    up_FH: torch.Tensor
    down_HG: torch.Tensor
    errors: list[float]
    """Relative error on the held-out tokens: before, and after each epoch."""


def polish(
    ffn: FFN,
    down_HG: torch.Tensor,
    parts: Partition,
    run_TN: torch.Tensor,
    x_TH: torch.Tensor,
    wanted_TH: torch.Tensor,
    *,
    held: int,
    schedule: Schedule = Schedule(),  # noqa: B008 - immutable
    weight_T: torch.Tensor | None = None,
    seed: int = 0,
) -> Polished:
    """Train the neurons that run for some token, so that the sparse FFN's output nears `wanted_TH`.

    Args:
        ffn: The dense FFN.
        down_HG: The down projection to start from, refitted as a rule.
        parts: Whose neurons are whose.
        run_TN: True where a routed expert runs.
        x_TH: Inputs of the FFN.
        wanted_TH: The output wanted.
        held: So many of the last tokens are not trained on: they choose the epoch. With 0 the last
            epoch is kept.
        schedule: How long and how fast.
        weight_T: What a token's error is multiplied by, 1 if None.
        seed: Of the order of the tokens.

    Needs five times the weights of the running neurons, and the activations of one mini-batch.
    """
    # Not under `torch.autocast` with its cache of weights: products would not see the steps.
    trained, tokens = Trained(ffn, down_HG, parts, run_TN), len(x_TH) - held
    weight_T1 = (x_TH.new_ones(len(x_TH)) if weight_T is None else weight_T).unsqueeze(1)
    seen, unseen = slice(tokens), slice(tokens, None)
    unit = (wanted_TH[seen] * weight_T1[seen]).square().mean().clamp_min(1e-30)
    errors = [trained.error(x_TH[unseen], run_TN[unseen], wanted_TH[unseen], weight_T1[unseen])]
    best, waited = trained.copies(), 0
    optimiser = trained.optimiser()
    steps = schedule.epochs * math.ceil(tokens / schedule.batch)
    rates = iter([rate_at(step, steps, schedule) for step in range(steps)])
    order = torch.Generator().manual_seed(seed)
    while len(errors) <= schedule.epochs and (not held or waited < schedule.patience):
        for rows_B in torch.randperm(tokens, generator=order).split(schedule.batch):
            rows_B = rows_B.to(x_TH.device)
            rate = next(rates)
            for group in optimiser.param_groups:
                group["lr"] = rate * group["size"]
            with torch.enable_grad():
                missing_BH = trained.output(x_TH[rows_B], run_TN[rows_B]) - wanted_TH[rows_B]
                loss = (missing_BH * weight_T1[rows_B]).square().mean() / unit
                loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        errors.append(
            trained.error(x_TH[unseen], run_TN[unseen], wanted_TH[unseen], weight_T1[unseen])
        )
        waited = 0 if errors[-1] <= min(errors) else waited + 1
        if not held or not waited:
            best = trained.copies()
    return Polished(*trained.scattered(best), errors)


def rate_at(step: int, steps: int, schedule: Schedule) -> float:
    """The relative rate of a step: a linear rise, then half a cosine down to zero."""
    rise = max(1, round(schedule.warm_up * steps))
    if step < rise:
        return schedule.rate * (step + 1) / rise
    return schedule.rate * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2


class Trained:
    """The neurons that run for some token, in the order of their experts, as parameters."""

    def __init__(
        self, ffn: FFN, down_HG: torch.Tensor, parts: Partition, run_TN: torch.Tensor
    ) -> None:
        self.ffn, self.down_HG = ffn, down_HG
        self.running = Running.of(parts, run_TN)
        self.ids_R = self.running.neurons_R
        rows = {"up": ffn.up_FH[self.ids_R], "down": down_HG.T[self.ids_R]}
        if ffn.gate_FH is not None:
            rows["gate"] = ffn.gate_FH[self.ids_R]
        self.rows = {name: row.detach().clone().requires_grad_() for name, row in rows.items()}
        self.up_bias_R = None if ffn.up_bias_F is None else ffn.up_bias_F[self.ids_R]

    def optimiser(self) -> torch.optim.Adam:
        """Adam, with the root mean square of each matrix as the `size` of its group."""
        groups = [
            {"params": [row], "size": max(row.detach().square().mean().sqrt().item(), 1e-30)}
            for row in self.rows.values()
        ]
        return torch.optim.Adam(groups, betas=(0.9, 0.95))

    def output(self, x_BH: torch.Tensor, run_BN: torch.Tensor) -> torch.Tensor:
        """Output of the sparse FFN, (B, H).

        All trained neurons are computed and the idle ones set to zero: whole products are faster
        than one small one for each of many experts, and their gradients are the same.
        """
        up_BR = x_BH @ self.rows["up"].T
        if self.up_bias_R is not None:
            up_BR = up_BR + self.up_bias_R
        if "gate" in self.rows:
            h_BR = self.ffn.act(x_BH @ self.rows["gate"].T) * up_BR
        else:
            h_BR = self.ffn.act(up_BR)
        y_BH = self.running.idle_zeroed(h_BR, run_BN) @ self.rows["down"]
        return y_BH + self.down_HG[:, -1] if self.ffn.is_biased else y_BH

    def error(
        self,
        x_TH: torch.Tensor,
        run_TN: torch.Tensor,
        wanted_TH: torch.Tensor,
        weight_T1: torch.Tensor,
    ) -> float:
        """Relative error of the output on some tokens; NaN for none."""
        missing = wanted = 0.0
        for tokens in slices(len(x_TH)):
            y_BH = self.output(x_TH[tokens], run_TN[tokens])
            missing += ((y_BH - wanted_TH[tokens]) * weight_T1[tokens]).square().sum().item()
            wanted += (wanted_TH[tokens] * weight_T1[tokens]).square().sum().item()
        return math.sqrt(missing / max(wanted, 1e-30)) if len(x_TH) else math.nan

    def copies(self) -> dict[str, torch.Tensor]:
        """The parameters as they are now."""
        return {name: row.detach().clone() for name, row in self.rows.items()}

    def scattered(
        self, rows: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Gate, up and down with some parameters in their places; idle neurons are as they were."""
        gate_FH, up_FH, down_HG = self.ffn.gate_FH, self.ffn.up_FH.clone(), self.down_HG.clone()
        up_FH[self.ids_R] = rows["up"]
        down_HG[:, self.ids_R] = rows["down"].T
        if gate_FH is not None:
            gate_FH = gate_FH.clone()
            gate_FH[self.ids_R] = rows["gate"]
        return gate_FH, up_FH, down_HG


def slices(tokens: int) -> list[slice]:
    """All tokens in batches."""
    return [slice(start, start + BATCH_TOKENS) for start in range(0, tokens, BATCH_TOKENS)]
