# SPDX-License-Identifier: Apache-2.0
"""Train one carved FFN by gradient descent towards its target output, the router left as it is.

A refit moves the down projection alone, in closed form. `polish` trains the gate, up and down
weights of the running neurons by Adam, with the same target: no labels are needed, and no gradient
leaves the layer. All randomness comes from one generator, so the same input gives the same bytes.

Shape suffixes: T tokens, B tokens of one mini-batch, H hidden size, F dense FFN width, G = F, or
F + 1 with an output bias, R running neurons, N routed experts.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch

from .decoder import BATCH_TOKENS
from .layer import FFN
from .partition import Partition
from .profile import activations
from .refit import Running, Samples


class Schedule(NamedTuple):
    """How long and how fast to train."""

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

    def rate_at(self, step: int, steps: int) -> float:
        """Return the relative rate of a step: a linear rise, then half a cosine down to zero."""
        rise = max(1, round(self.warm_up * steps))
        if step < rise:
            return self.rate * (step + 1) / rise
        return self.rate * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2


class Polished(NamedTuple):
    """The weights that did best on the held-out tokens, in the dense order of neurons."""

    ffn: FFN
    """With the trained gate and up weights, as they will be stored."""
    down_HG: torch.Tensor
    """The trained down projection, float32, with an output bias as its last column."""
    errors: list[float]
    """Relative error on the held-out tokens: before, and after each epoch."""


def polish(
    ffn: FFN,
    down_HG: torch.Tensor,
    parts: Partition,
    run_TN: torch.Tensor,
    samples: Samples,
    *,
    schedule: Schedule | None = None,
    seed: int = 0,
) -> Polished:
    """Train the neurons that run for some token, so that the sparse output nears the target.

    Needs five times the weights of the running neurons, and the activations of one mini-batch.

    Args:
        ffn: The dense FFN.
        down_HG: The down projection to start from, refitted as a rule.
        parts: The neurons of each expert.
        run_TN: True where a routed expert runs.
        samples: What to learn. Those held out choose the epoch; without any it is the last.
        schedule: How long and how fast to train.
        seed: Of the order of the tokens.
    """
    # Not under `torch.autocast` with its cache of weights: products would not see the steps.
    trained, schedule = Trained(ffn, down_HG, parts, run_TN), schedule or Schedule()
    held_out, tokens = samples.num_held_out, len(run_TN) - samples.num_held_out
    unseen = run_TN[tokens:], samples.take(slice(tokens, None))
    weighted_TH = samples.target_TH[:tokens] * samples.weight_T[:tokens, None]
    unit = weighted_TH.square().mean().clamp_min(1e-30)
    errors, best, waited = [trained.error(*unseen)], trained.copies(), 0
    optimiser = trained.optimiser()
    steps, step = schedule.epochs * math.ceil(tokens / schedule.batch), 0
    order = torch.Generator().manual_seed(seed)
    while len(errors) <= schedule.epochs and (not held_out or waited < schedule.patience):
        for chosen_B in torch.randperm(tokens, generator=order).split(schedule.batch):
            for group in optimiser.param_groups:
                group["lr"] = schedule.rate_at(step, steps) * group["size"]
            chosen_B = chosen_B.to(run_TN.device)
            with torch.enable_grad():
                missing_BH = trained.missing(run_TN[chosen_B], samples.take(chosen_B))
                (missing_BH.square().mean() / unit).backward()
            optimiser.step()
            optimiser.zero_grad()
            step += 1
        errors.append(trained.error(*unseen))
        waited = 0 if errors[-1] <= min(errors) else waited + 1
        if not held_out or not waited:
            best = trained.copies()
    return Polished(*trained.in_place(best), errors)


class Trained:
    """The neurons that run for some token, in the order of their experts, as parameters."""

    def __init__(
        self, ffn: FFN, down_HG: torch.Tensor, parts: Partition, run_TN: torch.Tensor
    ) -> None:
        self.ffn, self.down_HG = ffn, down_HG
        self.running = Running.of(parts, run_TN)
        self.ids_R = self.running.neurons_R
        rows = {"up": ffn.up_FH, "down": down_HG.T, "gate": ffn.gate_FH}
        self.rows = {
            name: row[self.ids_R].detach().clone().requires_grad_()
            for name, row in rows.items()
            if row is not None
        }
        self.up_bias_R = None if ffn.up_bias_F is None else ffn.up_bias_F[self.ids_R]

    def optimiser(self) -> torch.optim.Adam:
        """Create Adam, with the root mean square of each matrix as the `size` of its group."""
        groups = [
            {"params": [row], "size": max(row.detach().square().mean().sqrt().item(), 1e-30)}
            for row in self.rows.values()
        ]
        return torch.optim.Adam(groups, betas=(0.9, 0.95))

    def output(self, x_BH: torch.Tensor, run_BN: torch.Tensor) -> torch.Tensor:
        """Return the output of the sparse FFN, (B, H).

        All trained neurons are computed and the idle ones set to zero: whole products are faster
        than one small one for each of many experts, and their gradients are the same.
        """
        up_BR = x_BH @ self.rows["up"].T
        if self.up_bias_R is not None:
            up_BR = up_BR + self.up_bias_R
        gate_BR = x_BH @ self.rows["gate"].T if "gate" in self.rows else None
        h_BR = activations(gate_BR, up_BR, self.ffn.act)
        y_BH = self.running.mask_idle(h_BR, run_BN) @ self.rows["down"]
        return y_BH + self.down_HG[:, -1] if self.ffn.is_biased else y_BH

    def missing(self, run_BN: torch.Tensor, samples: Samples) -> torch.Tensor:
        """Return the weighted error of the output, (B, H)."""
        y_BH = self.output(samples.x_TH, run_BN)
        return (y_BH - samples.target_TH) * samples.weight_T[:, None]

    def error(self, run_TN: torch.Tensor, samples: Samples) -> float:
        """Return the relative error of the output; NaN for no tokens."""
        missing = target = 0.0
        for start in range(0, len(run_TN), BATCH_TOKENS):
            tokens = slice(start, start + BATCH_TOKENS)
            batch = samples.take(tokens)
            missing += self.missing(run_TN[tokens], batch).square().sum().item()
            target += (batch.target_TH * batch.weight_T[:, None]).square().sum().item()
        return math.sqrt(missing / max(target, 1e-30)) if len(run_TN) else math.nan

    def copies(self) -> dict[str, torch.Tensor]:
        """Return the parameters as they are now."""
        return {name: row.detach().clone() for name, row in self.rows.items()}

    def in_place(self, rows: dict[str, torch.Tensor]) -> tuple[FFN, torch.Tensor]:
        """Return the FFN and its down projection with `rows` for the neurons that run."""
        gate_FH, up_FH, down_HG = self.ffn.gate_FH, self.ffn.up_FH.clone(), self.down_HG.clone()
        up_FH[self.ids_R] = self.ffn.rounded(rows["up"])
        down_HG[:, self.ids_R] = rows["down"].T
        if gate_FH is not None:
            gate_FH = gate_FH.clone()
            gate_FH[self.ids_R] = self.ffn.rounded(rows["gate"])
        return replace(self.ffn, gate_FH=gate_FH, up_FH=up_FH, is_polished=True), down_HG
