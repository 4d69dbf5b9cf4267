# SPDX-License-Identifier: Apache-2.0
"""The whole job on the embedded default, offline and in half a minute."""

import tempfile
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import pipeline

from .carve.settings import ShapeOptions
from .carve.shape import Shape
from .convert import convert
from .measure.evaluate import evaluate
from .options import with_options

ASSETS = Path(__file__).parent / "assets"
MODEL = ASSETS / "llama-pydoc"
CALIBRATION = ASSETS / "calibration.txt"
HELD_OUT = ASSETS / "heldout.txt"
PROMPT = "When a function is called,"
SAMPLES = 32
"""Calibration windows: half of the default, so that three conversions take half a minute."""


@dataclass(frozen=True)
class Point:
    """One shape of the trade-off."""

    notation: str
    activation_ratio: float
    perplexity: float


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What the demo found; the keys of `cmoe demo --json`."""

    dense_perplexity: float
    carved_perplexity: float
    notation: str
    activation_ratio: float
    router_oracle_agreement: float | None
    router_chance_agreement: float | None
    shapes: list[Point]
    """The shape that was asked for, and others to compare it with."""
    generated_dense: str
    generated: str
    output: str | None
    """The carved repository; None if no folder was given, and it is gone."""


@dataclass(frozen=True)
class DemoOptions(ShapeOptions):
    """The options of `demo`."""

    output: str | Path | None = None
    """Keep the carved model in this folder."""
    _: KW_ONLY
    recipe: str = "refined"
    """Method: refined (ours), paper, or released: the choices of the authors' code."""
    compare: Sequence[str] = ("S3A3E8", "S2A2E8", "S1A1E8")
    """Shapes to compare; by default three quarters, half and a quarter of the FFN run."""
    overwrite: bool = False
    """Replace an existing model at OUT."""


@with_options(DemoOptions)
def demo(options: DemoOptions) -> Demo:
    """Carve the embedded default, measure dense and carved on held-out text, generate a line."""
    asked = Shape(options.shared, options.active, options.experts)
    with tempfile.TemporaryDirectory() as temporary:
        kept = Path(temporary, "kept") if options.output is None else Path(options.output)
        folders = {asked: kept}
        for shape in map(Shape.parse, options.compare):
            folders.setdefault(shape, Path(temporary, shape.notation))
        settings: dict[str, Any] = {"recipe": options.recipe, "overwrite": options.overwrite}
        settings |= {"calibration": CALIBRATION, "samples": SAMPLES}
        made = [convert(MODEL, it, **asdict(shape), **settings) for shape, it in folders.items()]
        found = [
            evaluate(it, baseline=MODEL if it == kept else None, text=HELD_OUT, dtype="float32")
            for it in folders.values()
        ]
        dense, carved = continuation(MODEL), continuation(kept)
    first, points = found[0], zip(folders, found, strict=True)
    assert first.baseline_perplexity is not None
    return Demo(
        dense_perplexity=first.baseline_perplexity,
        carved_perplexity=first.perplexity,
        notation=asked.notation,
        activation_ratio=asked.activation_ratio,
        router_oracle_agreement=first.router_oracle_agreement,
        router_chance_agreement=first.router_chance_agreement,
        shapes=[Point(it.notation, it.activation_ratio, one.perplexity) for it, one in points],
        generated_dense=dense,
        generated=carved,
        output=None if options.output is None else made[0].output,
    )


def continuation(model: Path) -> str:
    """Return what a model makes of the prompt, up to its last full stop."""
    [line] = pipeline("text-generation", model=str(model))(
        PROMPT, max_new_tokens=40, do_sample=False, no_repeat_ngram_size=6
    )
    text = " ".join(line["generated_text"].split())
    return text[: text.rfind(".") + 1] or text
