# SPDX-License-Identifier: Apache-2.0
"""The whole job on the embedded model, offline and in half a minute: carve, recover, compare."""

import tempfile
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import pipeline

from .carve.settings import ShapeOptions
from .carve.shape import Shape
from .convert import convert
from .embedded import CALIBRATION, HELD_OUT, MODEL
from .measure.benchmark import benchmark
from .measure.evaluate import evaluate
from .options import with_options
from .tune.recover import RecoveryFolder, recover
from .tune.settings import Tuning

PROMPT = "When a function is called,"
SAMPLES = 32
"""Calibration windows: half of the default."""
TRAINING = (f"{CALIBRATION}:20k", "own:20k")
TUNING = Tuning(sequence_length=256, learning_rate=1e-3)


@dataclass(frozen=True)
class Point:
    """One carved model."""

    notation: str
    activation_ratio: float
    perplexity: float
    divergence: float | None = None
    """From the dense model, nats a token; None if it was not measured."""
    recovered: bool = False


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What the demo found; the keys of `cmoe demo --json`."""

    dense_perplexity: float
    carved_perplexity: float
    notation: str
    activation_ratio: float
    router_oracle_agreement: float | None
    router_chance_agreement: float | None
    recovered_perplexity: float
    """After distillation on 40,000 tokens."""
    speedup: float
    """Time of a prompt of 256 tokens, dense over carved."""
    shapes: list[Point]
    """The shape that was asked for, carved and recovered, and others to compare it with."""
    generated_dense: str
    generated: str
    output: str | None
    """The recovered repository; None if no folder was given, and it is gone."""


@dataclass(frozen=True)
class DemoOptions(ShapeOptions):
    """The options of `demo`."""

    output: str | Path | None = None
    """Keep the recovered model in this folder."""
    _: KW_ONLY
    shared: int = 2
    """Shared experts, always on (S)."""
    active: int = 2
    """Routed experts run per token (A)."""
    recipe: str = "refined"
    """Method: refined (ours), paper, or released: the choices of the authors' code."""
    compare: Sequence[str] | None = None
    """Further shapes, carved and measured, for example S2A2E8,S1A1E8."""
    overwrite: bool = False
    """Replace an existing model at OUT."""


@with_options(DemoOptions)
def demo(options: DemoOptions) -> Demo:
    """Carve the embedded default, recover it, compare with the dense model on held-out text."""
    asked = Shape(options.shared, options.active, options.experts)
    settings: dict[str, Any] = {"recipe": options.recipe, "calibration": CALIBRATION}
    with tempfile.TemporaryDirectory() as temporary:
        kept = Path(temporary, "kept") if options.output is None else Path(options.output)
        RecoveryFolder(kept, overwrite=options.overwrite).check({})
        carved = Path(temporary, asked.notation)
        convert(MODEL, carved, **asdict(asked), **settings, samples=SAMPLES)
        routing = evaluate(carved, text=HELD_OUT, dtype="float32")
        recovery = recover(
            carved,
            kept,
            teacher=MODEL,
            training=list(TRAINING),
            text=HELD_OUT,
            dtype="float32",
            tuning=TUNING,
            overwrite=options.overwrite,
        )
        timed = benchmark(kept, baseline=MODEL, text=HELD_OUT, tokens=(), prefill=(256,), batch=())
        points = [
            Point(
                asked.notation,
                asked.activation_ratio,
                recovery.texts[0][when]["perplexity"],
                recovery.texts[0][when]["divergence"],
                recovered=when == "after",
            )
            for when in ("before", "after")
        ]
        for shape in map(Shape.parse, options.compare or ()):
            if shape != asked:
                other = Path(temporary, shape.notation)
                convert(MODEL, other, **asdict(shape), **settings, samples=SAMPLES)
                perplexity = evaluate(other, text=HELD_OUT, dtype="float32").perplexity
                points.append(Point(shape.notation, shape.activation_ratio, perplexity))
        dense, recovered = continuation(MODEL), continuation(kept)
    assert recovery.teacher_perplexity is not None
    return Demo(
        dense_perplexity=recovery.teacher_perplexity,
        carved_perplexity=recovery.perplexity_before,
        recovered_perplexity=recovery.perplexity_after,
        notation=asked.notation,
        activation_ratio=asked.activation_ratio,
        router_oracle_agreement=routing.router_oracle_agreement,
        router_chance_agreement=routing.router_chance_agreement,
        speedup=timed.prefill[0].speedup,
        shapes=points,
        generated_dense=dense,
        generated=recovered,
        output=None if options.output is None else recovery.output,
    )


def continuation(model: Path) -> str:
    """Return what a model makes of the prompt, up to its last full stop."""
    [line] = pipeline("text-generation", model=str(model))(
        PROMPT, max_new_tokens=40, do_sample=False, no_repeat_ngram_size=6
    )
    text = " ".join(line["generated_text"].split())
    return text[: text.rfind(".") + 1] or text
