# SPDX-License-Identifier: Apache-2.0
"""What a conversion is asked to do, checked as far as that is possible without the model."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..device import check_dtype
from ..errors import RequestError, check_at_least
from ..source.texts import OWN, Portion, absolute_text
from .recipe import Recipe
from .shape import Shape

CALIBRATION_TOKENS = 16_384
"""The paper's amount: 8 windows of 2,048 tokens."""
MAX_SHARD_SIZE = "5GB"
ACTIVATIONS = ("auto", "memory", "disk")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("kmgt", 1)}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgt]?|[kmgt]i)b?")


@dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    """A shape for those who do not choose one."""

    shared: int = 3
    """Shared experts, always on (S)."""
    active: int = 3
    """Routed experts run per token (A)."""
    experts: int = 8
    """Experts in all (E); must divide the FFN width."""


@dataclass(frozen=True, kw_only=True)
class CarvingOptions:
    """How to carve, whatever the shape."""

    recipe: str | Recipe = "refined"
    """Method: refined (ours), paper, or released: the choices of the authors' code."""
    calibration: str | Path = "wikitext2"
    """Text, JSONL, JSON or Parquet file (FILE:COLUMN names a column), wikitext2, c4,
    `dataset[:subset][:split][:column]` of the Hub, or own: what the dense model writes, own:500k so
    many tokens of it."""
    samples: int | None = None
    """Calibration windows; default 16,384 tokens' worth."""
    sequence_length: int | None = None
    """Tokens per window; default 2,048 or the model's context."""
    seed: int = 0
    """Seed of the windows' offsets, or of the model's own text; nothing else is random."""
    dtype: str | None = None
    """Of the carved weights: float32, bfloat16, float16; default the source's precision."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; default the fastest."""


@dataclass(frozen=True, kw_only=True)
class Settings(CarvingOptions):
    """The options of a conversion: give `budget`, or `experts` with `shared` and `active`."""

    experts: int | None = None
    """Experts in all (E); must divide the FFN width. Chosen if only --budget is given, and with
    them the layers that stay dense."""
    shared: int | None = None
    """Shared experts, always on (S)."""
    active: int | None = None
    """Routed experts run per token (A)."""
    budget: float | None = None
    """Share of the FFN neurons to run, instead of --active: each layer decides on held-out
    calibration tokens whether its active experts are routed or always run."""
    dense_layers: str | tuple[int, ...] = ""
    """Layers whose FFN stays dense, for example 0 or 0,29; all of their neurons run."""
    k_act: int = 10
    """Neurons marked per token (K_a)."""
    activations: str = "auto"
    """Where the calibration activations are kept: memory, disk, or auto: on the disk if they would
    not fit into memory."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    max_shard_size: str | int = MAX_SHARD_SIZE
    """Of a file of weights, for example 500MB or 2GiB; one file up to it."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model."""
    overwrite: bool = False
    """Replace an existing model at OUT."""

    def __post_init__(self) -> None:
        """Make paths absolute and a recipe of its name; refuse what no model could satisfy."""
        for name, normal in NORMAL.items():
            object.__setattr__(self, name, normal(getattr(self, name)))
        recipe, shape = Recipe.of(self.recipe), self.shape
        if self.budget is not None:
            recipe = replace(recipe, adaptive_split=True)
        object.__setattr__(self, "recipe", recipe)
        limit = min(shape.active, shape.experts - shape.shared - 1) if shape else recipe.always_on
        if shape and recipe.always_on > limit:
            raise RequestError(
                f"the recipe's always_on is {recipe.always_on}; at {shape.notation} it can be at "
                f"most {limit}: no more than are active, and one must be left to route."
            )
        if self.activations not in ACTIVATIONS:
            raise RequestError(
                f"activations cannot be kept in {self.activations!r}: choose "
                f"{', '.join(ACTIVATIONS)}."
            )
        check_dtype(self.dtype)
        shard_bytes(self.max_shard_size)
        if self.own_text is not None and self.own_text.tokens and self.samples is not None:
            raise RequestError(
                f"--calibration {self.calibration} says how much is written: leave out --samples."
            )
        lengths = {"samples": self.samples, "sequence_length": self.sequence_length}
        check_at_least(1, k_act=self.k_act, **lengths)

    @property
    def own_text(self) -> Portion | None:
        """Return how much the dense model writes, if it does. Raises `RequestError`."""
        portion = Portion.of(self.calibration)
        return portion if portion.text == OWN else None

    @property
    def shape(self) -> Shape | None:
        """Return S, A and E; None if the model decides, see `shape_for`. Raises `RequestError`."""
        if self.budget is None:
            if self.experts is None:
                raise RequestError("say into how many experts: --experts; or only --budget.")
            if self.shared is None or self.active is None:
                raise RequestError(
                    "say how much of the FFN runs: --shared and --active, or --budget."
                )
            return Shape(self.shared, self.active, self.experts)
        if self.active is not None:
            raise RequestError("--budget decides how many experts are active: leave out --active.")
        if self.experts is not None:
            return Shape.within(self.budget, self.shared, self.experts)
        if self.shared is not None:
            raise RequestError("--shared needs --experts: shared ones of how many?")
        return None

    def shape_for(self, layers: int, width: int) -> tuple[Shape, tuple[int, ...]]:
        """Return the shape in a model of `layers` FFNs of `width` neurons, and its dense layers."""
        dense, shape = layer_numbers(self.dense_layers), self.shape
        if shape is not None:
            return shape, dense
        assert self.budget is not None  # or there would be a shape
        return Shape.spread(self.budget, layers, width, dense or None)


@dataclass(frozen=True)
class ConvertOptions(Settings):
    """The options of `convert` and `plan`."""

    model: str | Path
    """Folder or Hub id of a supported dense model, with tokenizer and safetensors."""
    output: str | Path
    """Folder to create."""


def absolute(name: str | Path) -> str:
    """Return the absolute path of something that exists, or the name as it is."""
    path = Path(name).expanduser()
    return str(path.absolute() if path.exists() else name)


def shard_bytes(size: str | int) -> int:
    """Return `"500MB"`, `"2GiB"` or a number as bytes. Raise `RequestError` for others."""
    found = _SIZE.fullmatch(str(size).strip().lower())
    count = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if count < 1:
        raise RequestError(
            f"a file cannot have the size {size!r}: --max-shard-size is, for example, 5GB, 500MB "
            "or 2GiB."
        )
    return count


def layer_numbers(layers: str | Iterable[int]) -> tuple[int, ...]:
    """Return `"0,29"` as numbers, ascending, each once. Raise `RequestError` for others."""
    numbers = layers.split(",") if isinstance(layers, str) else layers
    try:
        return tuple(sorted({int(number) for number in numbers if str(number).strip()}))
    except ValueError as error:
        raise RequestError(
            f"--dense-layers {layers} are no numbers of layers such as 0 or 0,29."
        ) from error


NORMAL: dict[str, Callable[[Any], Any]] = {
    "recipe": Recipe.of,
    "calibration": absolute_text,
    "dense_layers": layer_numbers,
}
"""How the values of some fields are written down."""
