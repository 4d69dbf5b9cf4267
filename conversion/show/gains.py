# SPDX-License-Identifier: Apache-2.0
"""What was gained and lost: the table that a report opens with, dense beside one or two models."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import RequestError
from ..folder.results import recorded
from ..measure.benchmark import benchmark
from ..measure.evaluate import check_same_vocabulary, perplexity
from ..measure.routing import sparse_blocks
from .observe import Observation

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
Loader = Callable[[str | Path], Loaded]
Kind = Literal["number", "percent", "count", "bytes"]
Better = Literal["lower", "higher"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of the dense model and of each carved one; None where nobody measured it."""

    name: str
    kind: Kind
    better: Better | None
    """Which way is a gain."""
    values: list[float | None]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What is known of one carved model."""

    name: str
    notation: str
    perplexity: float
    activation_ratio: float
    dense_parameters: int
    """Without the routers: as many as the dense model has."""
    active_parameters: int
    bytes: int
    oracle_agreement: float | None
    imbalance: float | None
    error: float | None
    """Relative error of the FFN's output, mean of the layers that are known."""
    speed: tuple[float, float] | None = None
    """Tokens a second, dense and carved, decoding one sequence; measured in turn."""
    recorded: list[dict[str, Any]] = field(default_factory=list)
    """What `cmoe evaluate --card` has written into the repository."""

    def value(self, task: str, metric: str) -> float | None:
        """Of a record; None if there is none such."""
        found = [it for it in self.recorded if (it["task"], it["metric"]) == (task, metric)]
        return found[0]["value"] if found else None


def figures_of(
    name: str,
    folder: Path,
    model: PreTrainedModel,
    observation: Observation,
    errors: Sequence[float | None],
) -> Figures:
    """The figures of a model that is loaded and was observed. Raises `RequestError`."""
    layers, known = observation.layers, [error for error in errors if error is not None]
    blocks = list(sparse_blocks(model))
    total = count(model)
    return Figures(
        name=name,
        notation=model.config.notation,
        perplexity=observation.perplexity,
        activation_ratio=model.config.activation_ratio,
        dense_parameters=total - sum(count(block.gate) for block in blocks),
        active_parameters=total - sum(map(idle_parameters, blocks)),
        bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        oracle_agreement=mean([layer.oracle_agreement for layer in layers]),
        imbalance=mean([layer.imbalance for layer in layers]),
        error=mean(known),
        recorded=recorded_results(folder),
    )


def idle_parameters(block: Any) -> int:
    """Of a sparse block, for one token."""
    experts, active = block.gate.choice
    return round(count(block.experts) * (1 - active / experts)) if experts else 0


def count(module: nn.Module) -> int:
    """Its parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def recorded_results(folder: Path) -> list[dict[str, Any]]:
    """The records of evaluation.json. Raises `RequestError` if it cannot be read."""
    try:
        return recorded(folder)
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"evaluation.json of {folder.name} is damaged ({error}): repair it, or remove it."
        ) from error


def mean(values: Sequence[float | None]) -> float | None:
    """None if one of them is None, or there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def dense_perplexity(
    load: Loader,
    baseline: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    windows_WL: torch.Tensor,
) -> float:
    """Of the dense model, on the same windows. Raises `RequestError` for another vocabulary."""
    dense, theirs = load(baseline)
    if sparse_blocks(dense):
        raise RequestError(f"the baseline {baseline} is carved itself: give the dense model.")
    check_same_vocabulary(baseline, theirs, tokenizer)
    return perplexity(dense, windows_WL, description="baseline")


def decoding_speed(
    model: str | Path, baseline: str | Path, rounds: int, **loading: Any
) -> tuple[float, float]:
    """Tokens a second of the dense and of the carved model, decoding one sequence."""
    timed = benchmark(
        model, baseline=baseline, tokens=(), prefill=(), batch=(1,), rounds=rounds, **loading
    )
    [point] = timed.decode
    return 1000 / point.dense_ms, 1000 / point.carved_ms


def gains(models: Sequence[Figures], dense: float | None, text: str) -> dict[str, Any]:
    """The table: names of the columns, and rows that have at least one figure."""

    def row(
        name: str, kind: Kind, better: Better | None, dense: float | None, *own: float | None
    ) -> Row:
        return Row(name=name, kind=kind, better=better, values=[dense, *own])

    speeds = [model.speed for model in models]
    rows = [
        row(f"perplexity on {text}", "number", "lower", dense, *(it.perplexity for it in models)),
        *recorded_rows(models),
        row(
            "tokens a second, decoding one sequence",
            "number",
            "higher",
            speeds[0][0] if speeds[0] else None,
            *(speed[1] if speed else None for speed in speeds),
        ),
        row("FFN neurons run", "percent", "lower", 1.0, *(it.activation_ratio for it in models)),
        row(
            "parameters run for a token",
            "count",
            "lower",
            models[0].dense_parameters,
            *(it.active_parameters for it in models),
        ),
        row("size of the weights", "bytes", None, None, *(it.bytes for it in models)),
    ]
    if len(models) > 1:
        rows += [
            row(
                "the router picks the oracle's experts",
                "percent",
                "higher",
                None,
                *(it.oracle_agreement for it in models),
            ),
            row("load imbalance", "number", "lower", None, *(it.imbalance for it in models)),
            row("error of the FFN output", "percent", "lower", None, *(it.error for it in models)),
        ]
    known = [asdict(it) for it in rows if any(value is not None for value in it.values[1:])]
    names = [f"{model.name} {model.notation}" for model in models]
    return {"columns": ["dense", *names], "rows": known}


def recorded_rows(models: Sequence[Figures]) -> list[Row]:
    """Tasks and perplexities of evaluation.json, of every model that has them."""
    keys = {
        (it["task"], it["metric"]): it.get("baseline_value")
        for model in reversed(models)
        for it in model.recorded
    }
    rows = []
    for (task, metric), dense in keys.items():
        own = [model.value(task, metric) for model in models]
        is_loss = metric == "perplexity"
        rows.append(
            Row(
                name=f"{metric} on {task}, recorded" if is_loss else f"{task} ({metric})",
                kind="number" if is_loss else "percent",
                better="lower" if is_loss else "higher",
                values=[dense, *own],
            )
        )
    return rows
