# SPDX-License-Identifier: Apache-2.0
"""The verb `demo`: the whole job on the embedded default, offline and in half a minute."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import pipeline

from .carve.shape import Shape
from .convert import Conversion, convert
from .measure.evaluate import evaluate

ASSETS = Path(__file__).parent / "assets"
MODEL = ASSETS / "llama-pydoc"
CALIBRATION = ASSETS / "calibration.txt"
HELD_OUT = ASSETS / "heldout.txt"
PROMPT = "When a function is called,"
SAMPLES = 32
"""Calibration windows: half of the default, so that three conversions take half a minute."""
TRADE_OFF = ("S3A3E8", "S2A2E8", "S1A1E8")
"""Shapes to compare: three quarters, half and a quarter of the FFN run."""


@dataclass(frozen=True, kw_only=True)
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


def demo(
    output: str | Path | None = None,
    *,
    shared: int = 3,
    active: int = 3,
    experts: int = 8,
    recipe: str = "refined",
    compare: Sequence[str] = TRADE_OFF,
    overwrite: bool = False,
) -> Demo:
    """Carve the embedded default, measure dense and carved on held-out text, generate a line.

    Without `output` the repository is made in a temporary folder; those of the shapes to compare
    always are. See `convert` for the rest.
    """
    with tempfile.TemporaryDirectory() as temporary:

        def carve(shape: Shape, folder: Path, *, overwrite: bool = False) -> Conversion:
            return convert(
                MODEL,
                folder,
                shared=shape.shared,
                active=shape.active,
                experts=shape.experts,
                recipe=recipe,
                calibration=CALIBRATION,
                samples=SAMPLES,
                overwrite=overwrite,
            )

        asked = Shape(shared, active, experts)
        folder = Path(output) if output is not None else Path(temporary) / "carved"
        conversion = carve(asked, folder, overwrite=overwrite)
        measured = evaluate(folder, baseline=MODEL, text=HELD_OUT, dtype="float32")
        found = {asked: measured.perplexity}
        for shape in map(Shape.parse, compare):
            if shape not in found:
                other = carve(shape, Path(temporary) / shape.notation).output
                found[shape] = evaluate(other, text=HELD_OUT, dtype="float32").perplexity
        lines = {model: generated_by(model) for model in (MODEL, folder)}
    assert measured.baseline_perplexity is not None
    return Demo(
        dense_perplexity=measured.baseline_perplexity,
        carved_perplexity=measured.perplexity,
        notation=conversion.notation,
        activation_ratio=conversion.activation_ratio,
        router_oracle_agreement=measured.router_oracle_agreement,
        router_chance_agreement=measured.router_chance_agreement,
        shapes=[
            Point(notation=it.notation, activation_ratio=it.activation_ratio, perplexity=found[it])
            for it in found
        ],
        generated_dense=lines[MODEL],
        generated=lines[folder],
        output=conversion.output if output is not None else None,
    )


def generated_by(model: Path) -> str:
    """What a model makes of the prompt, up to its last full stop."""
    [line] = pipeline("text-generation", model=str(model))(
        PROMPT, max_new_tokens=40, do_sample=False, no_repeat_ngram_size=6
    )
    text = " ".join(line["generated_text"].split())
    return text[: text.rfind(".") + 1] or text
