# SPDX-License-Identifier: Apache-2.0
"""How a model is tuned: the options, and their defaults for each objective."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ..errors import RequestError, check_known

Value = TypeVar("Value")
POSITIVE = ("samples", "batch_size", "rank", "alpha", "epochs", "learning_rate")
NOT_NEGATIVE = ("router_learning_rate", "bias_speed", "warmup_steps", "max_gradient_norm")
SCHEDULES = ("constant", "linear", "cosine")
METHODS = ("full", "lora")
RULES: dict[str, tuple[Callable[[Any], bool], Sequence[str]]] = {
    "above 0": (lambda value: value is None or value > 0, POSITIVE),
    "at least 0": (lambda value: value is None or value >= 0, NOT_NEGATIVE),
    "at least 0 and below 1": (lambda value: 0 <= value < 1, ("adam_beta1", "adam_beta2")),
    "at least 2": (lambda value: value is None or value >= 2, ("sequence_length",)),
    ", ".join(SCHEDULES): (SCHEDULES.__contains__, ("schedule",)),
    " or ".join(METHODS): (lambda value: value in (None, *METHODS), ("method",)),
}
"""What the options of a tuning must be."""
PRESETS: dict[str, dict[str, Any]] = {
    "distil": {
        "batch_size": 4,
        "rank": 32,
        "schedule": "cosine",
        "warmup_steps": 0.05,
        "max_gradient_norm": 1.0,
        "bias_speed": 0.0,
    },
    "next-token": {
        "method": "lora",
        "batch_size": 2,
        "rank": 8,
        "learning_rate": 5.95e-5,
        "router_learning_rate": 1e-3,
        "schedule": "constant",
        "warmup_steps": 0,
        "max_gradient_norm": 0.0,
        "bias_speed": 1e-3,
    },
}
"""Defaults of each objective; those of `next-token` are the paper's (section 5.1)."""
WINDOW = {"distil": 512, "next-token": 2048}
"""Tokens of a window by default, if the contexts of the models are no shorter."""
USUAL_RATES = {"full": 0.003, "lora": 0.006}
"""Learning rate over the root mean square of the smallest tensor of experts: Adam's steps do not
depend on the size of gradients, and the weights of models differ by more than ten times."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a model is trained. Options left out have another default for each objective."""

    objective: str = "distil"
    """distil: match the dense model's distribution of the next token. next-token: fine-tune on the
    text with LoRA, as in the paper."""
    method: str | None = None
    """full: train all weights of experts and norms. lora: train LoRA factors on experts and
    attention. Default full if it fits into memory (next-token: lora)."""
    train_attention: bool = False
    """Train all weights of attention, too; LoRA always covers attention."""
    samples: int = 2048
    """Training windows of the texts given without a number of tokens."""
    sequence_length: int | None = None
    """Tokens per window; default 512 (next-token: 2,048), or the model's context if shorter."""
    epochs: float = 1.0
    """Passes over the windows."""
    batch_size: int | None = None
    """Windows per optimiser step, over all processes; default 4 (next-token: 2)."""
    micro_batch_size: int | None = None
    """Windows per forward pass on each process; default all of its share."""
    rank: int | None = None
    """Rank of the LoRA factors; default 32 (next-token: 8)."""
    alpha: int = 32
    """LoRA scaling: alpha / rank."""
    learning_rate: float | None = None
    """Learning rate of Adam; default 0.003 (LoRA: 0.006) of the smallest root mean square of an
    expert weight tensor (next-token: 5.95e-5)."""
    router_learning_rate: float | None = None
    """Learning rate of routers and gate scales, if they are trained; default that of all weights
    (next-token: 1e-3)."""
    adam_beta1: float = 0.9
    """Decay rate of Adam's first moment."""
    adam_beta2: float = 0.95
    """Decay rate of Adam's second moment."""
    schedule: str | None = None
    """Learning rate schedule: constant, linear or cosine; default cosine (next-token: constant)."""
    warmup_steps: float | None = None
    """Warm-up steps, or their share of all steps if below 1; default 0.05 (next-token: 0)."""
    max_gradient_norm: float | None = None
    """Clip gradients to this norm, 0 never; default 1 (next-token: 0)."""
    bias_speed: float | None = None
    """Initial step of the balance biases, which falls linearly to 0, so that the last few batches
    do not decide; 0 freezes them. Default 0 (next-token: 1e-3)."""
    train_router: bool = False
    """Train routers and gate scales, too; a model with trained scales cannot be exported.
    next-token always trains the scales."""
    gradient_checkpointing: bool = False
    """Save memory by computing activations a second time."""
    seed: int = 0
    """Seed of windows, order, LoRA factors and the text that the teacher generates."""

    def __post_init__(self) -> None:
        """Take what is left open from the objective. Raise `RequestError` for what cannot be."""
        check_known("objective", self.objective, PRESETS)
        for name, value in PRESETS[self.objective].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for rule, (holds, names) in RULES.items():
            for name in names:
                if not holds(value := getattr(self, name)):
                    raise RequestError(f"{name} is {value}; it must be {rule}.")
        if not self.distils and self.method == "full":
            raise RequestError("--objective next-token trains LoRA: leave out --method full.")
        self.split(1)

    @property
    def distils(self) -> bool:
        """Return whether a dense model is the teacher."""
        return self.objective == "distil"

    def with_rates(self, size: float) -> "Tuning":
        """Return it with learning rates for experts of which no tensor is smaller."""
        rate, routers = self.learning_rate, self.router_learning_rate
        rate = rate or size * USUAL_RATES[some(self.method)]
        routers = rate if routers is None else routers
        return replace(self, learning_rate=rate, router_learning_rate=routers)

    def split(self, processes: int) -> tuple[int, int]:
        """Return windows of a forward pass on each process, and passes of an optimiser step."""
        assert self.batch_size is not None
        micro = self.micro_batch_size or max(1, self.batch_size // processes)
        if micro < 1 or self.batch_size % (micro * processes):
            raise RequestError(
                f"batch_size {self.batch_size} cannot be split into {processes} processes with "
                f"{micro} windows at a time: make it a multiple of {max(micro, 1) * processes}."
            )
        return micro, self.batch_size // (micro * processes)

    def steps(self, windows: int) -> int:
        """Return the optimiser steps over that many windows."""
        assert self.batch_size is not None
        return math.ceil(math.ceil(windows / self.batch_size) * self.epochs)


def some(value: Value | None) -> Value:
    """Return a value that the objective or the model has decided."""
    assert value is not None
    return value
