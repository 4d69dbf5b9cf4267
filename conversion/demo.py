# SPDX-License-Identifier: Apache-2.0
"""The verb `demo`: the whole job on the embedded default, offline and in seconds."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from transformers import pipeline

from .convert import convert
from .measure.evaluate import evaluate

ASSETS = Path(__file__).parent / "assets"
MODEL = ASSETS / "llama-pydoc"
CALIBRATION = ASSETS / "calibration.txt"
HELD_OUT = ASSETS / "heldout.txt"
PROMPT = "The value of the expression"


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What the demo found; the keys of `cmoe demo --json`."""

    dense_perplexity: float
    carved_perplexity: float
    notation: str
    activation_ratio: float
    router_oracle_agreement: float | None
    router_chance_agreement: float | None
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
    overwrite: bool = False,
) -> Demo:
    """Carve the embedded default, measure dense and carved on held-out text, generate a line.

    Without `output` the repository is made in a temporary folder. See `convert` for the rest.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(output) if output is not None else Path(temporary) / "carved"
        conversion = convert(
            MODEL,
            folder,
            shared=shared,
            active=active,
            experts=experts,
            recipe=recipe,
            calibration=CALIBRATION,
            overwrite=overwrite,
        )
        measured = evaluate(folder, baseline=MODEL, text=HELD_OUT, dtype="float32")
        generate = pipeline("text-generation", model=str(folder))
        [line] = generate(PROMPT, max_new_tokens=40, do_sample=False)
    assert measured.baseline_perplexity is not None
    return Demo(
        dense_perplexity=measured.baseline_perplexity,
        carved_perplexity=measured.perplexity,
        notation=conversion.notation,
        activation_ratio=conversion.activation_ratio,
        router_oracle_agreement=measured.router_oracle_agreement,
        router_chance_agreement=measured.router_chance_agreement,
        generated=" ".join(line["generated_text"].split()),
        output=conversion.output if output is not None else None,
    )
