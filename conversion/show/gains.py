# SPDX-License-Identifier: Apache-2.0
"""The table that a report opens with: gains and losses, dense beside one or two carved models."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import RequestError
from ..folder.results import recorded
from ..measure.benchmark import benchmark
from ..measure.evaluate import check_same_vocabulary, perplexity
from ..measure.routing import check_flat, sparse_blocks
from ..source.checkpoint import fetch_model, find_model
from .observe import Observation

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
Loader = Callable[[str | Path], Loaded]


@dataclass(frozen=True)
class Row:
    """One figure of the dense model and of each carved one; None where nobody measured it."""

    name: str
    kind: Literal["number", "percent", "count", "bytes"]
    better: Literal["lower", "higher"] | None
    """Which way is a gain."""
    values: list[float | None]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What is known of one carved model."""

    name: str
    """With its notation."""
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
    speed: tuple[float, float] | tuple[None, None] = (None, None)
    """Tokens a second, dense and carved, decoding one sequence; measured in turn."""
    recorded: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    """What `cmoe evaluate --card` has written into the repository, by task and metric."""


@dataclass(frozen=True)
class CarvedModel:
    """A carved model before it is loaded, with what lies beside its weights."""

    model: str | Path
    """As it was asked for."""
    folder: Path
    name: str
    conversion: dict[str, Any]
    """Content of conversion.json, empty if there is none."""
    recorded: list[dict[str, Any]]
    """The records of evaluation.json."""


def look_up(model: str | Path) -> CarvedModel:
    """Find a carved model. Raise `RequestError` if there is none, or a file of it is damaged."""
    folder, name, commit = find_model(model)
    check_flat(folder)
    if commit is not None:
        folder = fetch_model(name, commit)
    file = folder / "conversion.json"
    try:
        conversion = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise RequestError(
            f"conversion.json is damaged ({error}). Without it the page can be made: remove it."
        ) from error
    try:
        return CarvedModel(model, folder, name, conversion, recorded(folder))
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"evaluation.json of {folder.name} is damaged ({error}): repair it, or remove it."
        ) from error


def layer_errors(conversion: dict[str, Any], count: int) -> list[float | None]:
    """Return the relative output error of each carved layer; None where it is not known."""
    layers = [layer for layer in conversion.get("layers", []) if "dense" not in layer]
    errors = [layer.get("relative_output_error") for layer in layers]
    return errors if len(errors) == count else [None] * count


def figures_of(carved: CarvedModel, model: PreTrainedModel, observation: Observation) -> Figures:
    """Return what is known of a model that is loaded and was observed."""
    layers, blocks, total = observation.layers, sparse_blocks(model), count(model)
    return Figures(
        name=f"{carved.name} {model.config.notation}",
        perplexity=observation.perplexity,
        activation_ratio=model.config.activation_ratio,
        dense_parameters=total - sum(count(block.gate) for block in blocks),
        active_parameters=total - sum(map(idle_parameters, blocks)),
        bytes=sum(path.stat().st_size for path in carved.folder.glob("*.safetensors")),
        oracle_agreement=mean([layer.oracle_agreement for layer in layers]),
        imbalance=mean([layer.imbalance for layer in layers]),
        error=mean(layer_errors(carved.conversion, len(layers))),
        recorded={(it["task"], it["metric"]): it for it in carved.recorded},
    )


def idle_parameters(block: Any) -> int:
    """Return how many parameters of a sparse block one token does not run."""
    experts, active = block.gate.choice
    return round(count(block.experts) * (1 - active / experts)) if experts else 0


def count(module: nn.Module) -> int:
    """Return the number of its parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of what is known, None if nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def dense_perplexity(
    load: Loader,
    baseline: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    windows_WL: torch.Tensor,
) -> float:
    """Return that of the dense model, on the same windows. Raise `RequestError`."""
    dense, theirs = load(baseline)
    if sparse_blocks(dense):
        raise RequestError(f"the baseline {baseline} is carved itself: give the dense model.")
    check_same_vocabulary(baseline, theirs, tokenizer)
    return perplexity(dense, windows_WL, description="baseline")


def timed(
    models: Sequence[Figures],
    carved: Sequence[CarvedModel],
    baseline: str | Path,
    rounds: int,
    *,
    device: torch.device,
    **loading: Any,
) -> list[Figures]:
    """Return the figures with speeds: dense and carved decode one sequence, in turn."""
    sizes: dict[str, Any] = {"tokens": (), "prefill": (), "batch": (1,), "rounds": rounds}
    sizes |= {"device": str(device), **loading}
    points = [benchmark(it.model, baseline=baseline, **sizes).decode[0] for it in carved]
    speeds = [(1000 / point.dense_ms, 1000 / point.carved_ms) for point in points]
    return [replace(it, speed=speed) for it, speed in zip(models, speeds, strict=True)]


def gains(models: Sequence[Figures], dense: float | None, text: str) -> dict[str, Any]:
    """Return the table: names of the columns, and rows that have at least one figure."""

    def row(name: str, kind: Any, better: Any, dense: float | None, figure: str) -> Row:
        return Row(name, kind, better, [dense, *(getattr(model, figure) for model in models)])

    first, speeds = models[0], [model.speed for model in models]
    rows = [
        row(f"perplexity on {text}", "number", "lower", dense, "perplexity"),
        *recorded_rows(models),
        Row(
            "tokens a second, decoding one sequence",
            "number",
            "higher",
            [speeds[0][0], *(carved for _, carved in speeds)],
        ),
        row("FFN neurons run", "percent", "lower", 1.0, "activation_ratio"),
        row(
            *("parameters run for a token", "count", "lower"),
            *(first.dense_parameters, "active_parameters"),
        ),
        row("size of the weights", "bytes", None, None, "bytes"),
    ]
    if len(models) > 1:
        rows += [
            row(
                *("the router picks the oracle's experts", "percent", "higher"),
                *(None, "oracle_agreement"),
            ),
            row("load imbalance", "number", "lower", None, "imbalance"),
            row("error of the FFN output", "percent", "lower", None, "error"),
        ]
    known = [asdict(it) for it in rows if any(value is not None for value in it.values[1:])]
    return {"columns": ["dense", *(model.name for model in models)], "rows": known}


def recorded_rows(models: Sequence[Figures]) -> list[Row]:
    """Return the tasks and perplexities of evaluation.json, of every model that has them."""
    records: dict[tuple[str, str], dict[str, Any]] = {}
    for model in reversed(models):
        records |= model.recorded
    rows = []
    for (task, metric), record in records.items():
        own = [model.recorded.get((task, metric), {}).get("value") for model in models]
        values = [record.get("baseline_value"), *own]
        if metric == "perplexity":
            rows.append(Row(f"perplexity on {task}, recorded", "number", "lower", values))
        else:
            rows.append(Row(f"{task} ({metric})", "percent", "higher", values))
    return rows
