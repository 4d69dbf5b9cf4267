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
    schedule, running = schedule or Schedule(), Running.of(parts, run_TN)
    trained, tokens = Trained(ffn, down_HG, running), len(run_TN) - samples.num_held_out
    held_out = run_TN[tokens:], samples.take(slice(tokens, None))
    weighted_TH = samples.target_TH[:tokens] * samples.weight_T[:tokens, None]
    unit = weighted_TH.square().mean().clamp_min(1e-30)
    del weighted_TH
    errors, best, waited = [trained.error(*held_out)], trained.result(), 0
    optimiser = trained.optimiser()
    steps, step = schedule.epochs * math.ceil(tokens / schedule.batch), 0
    order = torch.Generator().manual_seed(seed)
    while len(errors) <= schedule.epochs and waited < schedule.patience:
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
        errors.append(trained.error(*held_out))
        waited = waited + 1 if errors[-1] > min(errors) else 0  # without held-out tokens always 0
        if not waited:
            best = trained.result()
    return Polished(*best, errors)


class Trained:
    """The neurons that run for some token, as parameters."""

    def __init__(self, ffn: FFN, down_HG: torch.Tensor, running: Running) -> None:
        self.ffn, self.down_HG, self.running = ffn, down_HG, running
        ids_R = running.neurons_R
        self.part = replace(
            ffn,
            gate_FH=None if ffn.gate_FH is None else ffn.gate_FH[ids_R].requires_grad_(),
            up_FH=ffn.up_FH[ids_R].requires_grad_(),
            up_bias_F=None if ffn.up_bias_F is None else ffn.up_bias_F[ids_R],
        )
        self.down_RH = down_HG.T[ids_R].requires_grad_()

    def optimiser(self) -> torch.optim.Adam:
        """Create Adam, with the root mean square of each matrix as the `size` of its group."""
        weights = (self.part.gate_FH, self.part.up_FH, self.down_RH)
        groups = [
            {"params": [w], "size": max(w.detach().square().mean().sqrt().item(), 1e-30)}
            for w in weights
            if w is not None
        ]
        return torch.optim.Adam(groups, betas=(0.9, 0.95))

    def missing(self, run_BN: torch.Tensor, samples: Samples) -> torch.Tensor:
        """Return the weighted error of the sparse output, (B, H)."""
        # One product for all experts, with zeros for idle neurons: faster than one for each.
        y_BH = self.running.mask_idle(self.part.hidden(samples.x_TH), run_BN) @ self.down_RH
        y_BH = y_BH + self.down_HG[:, -1] if self.ffn.is_biased else y_BH
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

    def result(self) -> tuple[FFN, torch.Tensor]:
        """Return a copy of the FFN and of its down projection, with the parameters in place."""
        ids_R, gate_FH = self.running.neurons_R, self.ffn.gate_FH
        if gate_FH is not None and self.part.gate_FH is not None:
            gate_FH = gate_FH.clone()
            gate_FH[ids_R] = self.ffn.rounded(self.part.gate_FH.detach())
        up_FH, down_HG = self.ffn.up_FH.clone(), self.down_HG.clone()
        up_FH[ids_R] = self.ffn.rounded(self.part.up_FH.detach())
        down_HG[:, ids_R] = self.down_RH.detach().T
        return replace(self.ffn, gate_FH=gate_FH, up_FH=up_FH, is_polished=True), down_HG
