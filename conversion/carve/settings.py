# SPDX-License-Identifier: Apache-2.0
"""What a conversion is asked to do, checked as far as that is possible without the model."""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self, TypedDict

from ..device import check_dtype
from ..errors import RequestError
from ..source.texts import absolute_text
from .recipe import RECIPES, Recipe

CALIBRATION_TOKENS = 16_384
"""The paper's amount: 8 windows of 2,048 tokens."""
MAX_SHARD_SIZE = "5GB"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("kmgt", 1)}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgt]?|[kmgt]i)b?")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that determines the result; recorded in `conversion.json`."""

    shared: int
    """Shared units S."""
    active: int
    """Routed experts run per token, A."""
    experts: int
    """Units in all, E: S shared ones and E - S routed experts."""
    budget: float | None = None
    """Share of the FFN neurons to run, if that was asked for instead of S and A."""
    recipe: str = "refined"
    """One of `recipe.RECIPES`."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of the recipe that differ from it, for ablations."""
    calibration: str = "wikitext2"
    """Text file or data set, see `texts.open_text`."""
    samples: int | None = None
    """Calibration windows; by default as many as make 16,384 tokens."""
    sequence_length: int | None = None
    """Tokens of a window; by default 2,048, or the model's context if that is shorter."""
    k_act: int = 10
    """Neurons marked per token, K_a."""
    seed: int = 0
    """Of the windows' offsets; nothing else is random."""
    dtype: str | None = None
    """Precision of the carved weights; by default that of the source."""

    def __post_init__(self) -> None:
        """Refuse what no model could satisfy. Raises `RequestError`."""
        if self.shared < 0 or self.active < 0 or self.experts < 1:
            raise RequestError(
                f"S={self.shared}, A={self.active}, E={self.experts}: shared and active cannot "
                "be negative, and there must be at least one expert."
            )
        if self.shared + self.active > self.experts:
            raise RequestError(
                f"{self.notation} asks for {self.shared} shared + {self.active} active = "
                f"{self.shared + self.active} experts, but there are only {self.experts}. "
                "Lower --shared or --active, or raise --experts."
            )
        if self.shared + self.active == 0:
            raise RequestError(
                f"{self.notation} runs no neuron at all. Raise --shared or --active."
            )
        if self.shared == self.experts:
            raise RequestError(
                f"{self.notation} leaves nothing to route: with every expert shared it is the "
                "dense model. Lower --shared."
            )
        if self.recipe not in RECIPES:
            raise RequestError(
                f"there is no recipe {self.recipe!r}; choose one of {', '.join(RECIPES)}."
            )
        known = {choice.name for choice in fields(Recipe)}
        unknown = sorted(self.changes.keys() - known)
        if unknown:
            raise RequestError(
                f"a recipe has no choice {', '.join(unknown)}; it has {', '.join(sorted(known))}."
            )
        limit = min(self.active, self.experts - self.shared - 1)
        if self.choices.pinned > limit:  # also refuses a choice that does not exist
            raise RequestError(
                f"the recipe's pinned is {self.choices.pinned}; at {self.notation} it can be at "
                f"most {limit}: no more than are active, and one must be left to route."
            )
        check_dtype(self.dtype)
        for name in ("samples", "sequence_length", "k_act"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name} is {value}; it must be at least 1.")

    @property
    def choices(self) -> Recipe:
        """The recipe with the changes."""
        return replace(RECIPES[self.recipe], **self.changes)

    @property
    def notation(self) -> str:
        """The paper's name of the shape, for example `S3A3E8`."""
        return f"S{self.shared}A{self.active}E{self.experts}"


def units(
    shared: int | None, active: int | None, experts: int, budget: float | None
) -> tuple[int, int]:
    """S and A, as asked for or from a budget. Raises `RequestError` if that is not possible."""
    if budget is None:
        if shared is None or active is None:
            raise RequestError("say how much of the FFN runs: --shared and --active, or --budget.")
        return shared, active
    if active is not None:
        raise RequestError("--budget decides how many experts are active: leave out --active.")
    running = round(budget * experts) if 0 < budget < 1 else 0
    if not 0 < running < experts or abs(running - budget * experts) > 1e-6:
        fitting = ", ".join(f"{count / experts:g}" for count in range(1, min(experts, 33)))
        raise RequestError(
            f"--budget {budget:g} is not a whole number of {experts} experts. It can be {fitting}; "
            "or change --experts."
        )
    shared = running // 2 if shared is None else shared
    if shared > running:
        raise RequestError(
            f"--shared {shared} is more than the {running} experts that --budget {budget:g} runs."
        )
    return shared, running - shared


class Options(TypedDict, total=False):
    """The keyword arguments of `convert` and `plan`. Only `experts` has no default."""

    experts: int
    """E: experts in all; must divide the FFN width."""
    shared: int | None
    """S: shared experts."""
    active: int | None
    """A: routed experts run per token."""
    budget: float | None
    """Share of the FFN neurons to run, instead of `active`. Each layer then decides on held-out
    calibration tokens how many of the active experts always run."""
    recipe: str
    """`"refined"`, `"paper"` or `"released"`, see `recipe.RECIPES`."""
    changes: Mapping[str, Any] | None
    """Fields of the recipe to change, for example `{"refit": False}`."""
    calibration: str | Path
    """Text file, `wikitext2`, `c4` or a Hub data set, see `texts.open_text`."""
    samples: int | None
    """Number of calibration windows; by default as many as make 16,384 tokens."""
    sequence_length: int | None
    """Tokens of a window; by default 2,048, or the model's context if that is shorter."""
    k_act: int
    """Neurons marked per token (K_a), 10."""
    seed: int
    """Seed of the windows' random offsets, 0."""
    dtype: str | None
    """Precision of the carved weights, by default that of the source."""
    device: str | None
    """Where to compute, by default the accelerator if there is one."""
    activations: str
    """Where the calibration activations are kept: `"memory"`, `"disk"`, or `"auto"`: on the disk
    if they would not fit into memory."""
    revision: str | None
    """Branch, tag or commit of a Hub model."""
    max_shard_size: str | int
    """Of a file of weights: `"5GB"`, or for example `"500MB"`, `"2GiB"` or a number of bytes."""
    trust_remote_code: bool
    """Accept a source that carries Python code; see `checkpoint.open_source`."""


ACTIVATIONS = ("auto", "memory", "disk")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A conversion but for its output: what a work folder needs to go on."""

    model: str
    """Absolute path or Hub id."""
    revision: str | None
    settings: Settings
    device: str | None
    activations: str
    max_shard_size: str | int = MAX_SHARD_SIZE
    trust_remote_code: bool = False

    @classmethod
    def of(
        cls,
        model: str | Path,
        *,
        experts: int,
        shared: int | None = None,
        active: int | None = None,
        budget: float | None = None,
        changes: Mapping[str, Any] | None = None,
        calibration: str | Path = "wikitext2",
        device: str | None = None,
        activations: str = "auto",
        revision: str | None = None,
        max_shard_size: str | int = MAX_SHARD_SIZE,
        trust_remote_code: bool = False,
        **others: Any,
    ) -> Self:
        """From the options of `convert`. Raises `RequestError`."""
        if activations not in ACTIVATIONS:
            raise RequestError(
                f"activations cannot be kept in {activations!r}: choose {', '.join(ACTIVATIONS)}."
            )
        shard_bytes(max_shard_size)  # refuses what is no size
        shared, active = units(shared, active, experts, budget)
        settings = Settings(
            shared=shared,
            active=active,
            experts=experts,
            budget=budget,
            changes=({"adaptive_split": True} if budget is not None else {}) | dict(changes or {}),
            calibration=absolute_text(calibration),
            **others,
        )
        return cls(
            model=absolute(model),
            revision=revision,
            settings=settings,
            device=device,
            activations=activations,
            max_shard_size=max_shard_size,
            trust_remote_code=trust_remote_code,
        )

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """The inverse of `record`."""
        return cls(**record | {"settings": Settings(**record["settings"])})

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def absolute(name: str | Path) -> str:
    """The absolute path of something that exists, or the name as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else str(name)


def public_name(name: str) -> str:
    """What may be told of something that `absolute` named: of a path, its last part only."""
    return Path(os.path.normpath(name)).name if Path(name).is_absolute() else name


def shard_bytes(size: str | int) -> int:
    """`"500MB"`, `"2GiB"` or a number of bytes as bytes. Raises `RequestError` for others."""
    found = _SIZE.fullmatch(str(size).strip().lower())
    count = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if count < 1:
        raise RequestError(
            f"a file cannot have the size {size!r}: --max-shard-size is, for example, 5GB, 500MB "
            "or 2GiB."
        )
    return count
