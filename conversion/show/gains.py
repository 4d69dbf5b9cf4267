# SPDX-License-Identifier: Apache-2.0
"""The table that a report opens with: gains and losses, dense beside one or two carved models."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import RequestError
from ..folder.fingerprint import conversion_record
from ..folder.results import recorded
from ..measure.routing import check_flat, sparse_blocks
from ..source.hub import fetch_model, find_model
from .observe import Observation


@dataclass(frozen=True)
class CarvedModel:
    """A carved model before it is loaded, with what lies beside its weights."""

    model: str | Path
    """As it was asked for."""
    folder: Path
    name: str
    conversion: dict[str, Any]
    """Content of conversion.json, empty if there is none."""
    recorded: dict[tuple[str, str], dict[str, Any]]
    """The records of evaluation.json by task and metric."""


def look_up(model: str | Path) -> CarvedModel:
    """Find a carved model. Raise `RequestError` if there is none, or a file of it is damaged."""
    folder, name, commit = find_model(model)
    check_flat(folder)
    if commit is not None:
        folder = fetch_model(name, commit)
    try:
        records = {(it["task"], it["metric"]): it for it in recorded(folder)}
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"evaluation.json of {folder.name} is damaged ({error}): repair it, or remove it."
        ) from error
    return CarvedModel(model, folder, name, conversion_record(folder), records)


def layer_errors(conversion: dict[str, Any], count: int) -> list[float | None]:
    """Return the relative output error of each carved layer; None where it is not known."""
    layers = [layer for layer in conversion.get("layers", []) if "dense" not in layer]
    errors = [layer.get("relative_output_error") for layer in layers]
    return errors if len(errors) == count else [None] * count


def figures_of(
    carved: CarvedModel, model: PreTrainedModel, observation: Observation
) -> dict[str, Any]:
    """Return what is known of a model that is loaded and was observed."""
    layers, blocks, total = observation.layers, sparse_blocks(model), count(model)
    return {
        "name": f"{carved.name} {model.config.notation}",
        **observation.quality._asdict(),
        "activation_ratio": model.config.activation_ratio,
        # Without the routers: as many as the dense model has.
        "dense_parameters": total - sum(count(block.gate) for block in blocks),
        "active_parameters": total - sum(map(idle_parameters, blocks)),
        "bytes": sum(path.stat().st_size for path in carved.folder.glob("*.safetensors")),
        "oracle_agreement": mean([layer["oracle_agreement"] for layer in layers]),
        "imbalance": mean([layer["imbalance"] for layer in layers]),
        "error": mean(layer_errors(carved.conversion, len(layers))),
        "recorded": carved.recorded,
    }


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


def gains(
    models: Sequence[dict[str, Any]], text: str, speeds: list[float | None]
) -> dict[str, Any]:
    """Return the table: names of the columns, and rows that have at least one figure.

    A row has a `name`, its `values` (dense, then the models; None where not measured), their
    `kind` (number, percent, count or bytes), and which way is `better` (lower, higher or None).
    """
    rows: list[dict[str, Any]] = []

    def add(name: str, kind: str, better: str | None, values: Sequence[float | None]) -> None:
        if any(value is not None for value in values[1:]):
            rows.append({"name": name, "kind": kind, "better": better, "values": list(values)})

    def known(figure: str) -> list[float | None]:
        return [model[figure] for model in models]

    def add_text(text: str, dense: float | None, figures: Sequence[dict[str, Any]]) -> None:
        apart, same, own = (
            [it.get(name) for it in figures] for name in ("divergence", "agreement", "perplexity")
        )
        add(f"KL(dense || carved) on {text}, nats a token", "number", None, [0.0, *apart])
        add(f"the dense model's likeliest token on {text}", "percent", "higher", [1.0, *same])
        add(f"perplexity on {text}", "number", "lower", [dense, *own])

    add_text(text, models[0]["baseline_perplexity"], models)
    records: dict[tuple[str, str], dict[str, Any]] = {}
    for model in reversed(models):
        records |= model["recorded"]
    for key, record in records.items():
        own = [model["recorded"].get(key, {}) for model in models]
        dense, values = record.get("baseline_value"), [it.get("value") for it in own]
        if key[1] == "perplexity":
            figures = [{**it, "perplexity": it.get("value")} for it in own]
            add_text(f"{key[0]}, recorded", dense, figures)
        elif key[1].endswith(("perplexity", "bits_per_byte")):
            add("{} ({})".format(*key), "number", "lower", [dense, *values])
        else:
            add("{} ({})".format(*key), "percent", "higher", [dense, *values])
    add("tokens a second, decoding one sequence", "number", "higher", speeds)
    add("FFN neurons run", "percent", "lower", [1.0, *known("activation_ratio")])
    active = [models[0]["dense_parameters"], *known("active_parameters")]
    add("parameters run for a token", "count", "lower", active)
    add("size of the weights", "bytes", None, [None, *known("bytes")])
    if len(models) > 1:
        agreement = "the router picks the oracle's experts"
        add(agreement, "percent", "higher", [None, *known("oracle_agreement")])
        add("load imbalance", "number", "lower", [None, *known("imbalance")])
        add("error of the FFN output", "percent", "lower", [None, *known("error")])
    return {"columns": ["dense", *known("name")], "rows": rows}
