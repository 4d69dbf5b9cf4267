# SPDX-License-Identifier: Apache-2.0
"""Measured figures, written into a model's folder: `evaluation.json` and the card's metadata.

A record is a dictionary with `task` (a task of the harness, or the name of a text), `metric`,
`value`, and whatever else a reader needs to measure the same again. It holds no path.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard

from ..device import versions
from ..errors import RequestError
from ..source.hub import find_model
from .card import CARD_FILE, with_perplexity
from .json_utils import to_json
from .paths import replace_file

RESULTS_FILE = "evaluation.json"
CONDITIONS = {
    "few_shot": "{}-shot",
    "limit": "first {} documents only",
    "sequence_length": "windows of {} tokens",
    "windows": "first {} windows only",
}
"""Fields of a record that the card states beside the task, and how."""


def results_folder(model: str | Path) -> Path:
    """Return the folder of a model whose card can take figures. Raise `RequestError`."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise RequestError(
            f"--card writes into a local folder, and {model} is none: download the model first."
        )
    if not (folder / CARD_FILE).is_file():
        raise RequestError(f"{folder.name} has no {CARD_FILE} that --card could write into.")
    try:
        recorded(folder)
        ModelCard.load(folder / CARD_FILE)
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise RequestError(
            f"{RESULTS_FILE} or the metadata of {CARD_FILE} in {folder.name} cannot be read: "
            f"{error}. Repair it, or leave --card out."
        ) from error
    return folder


def write_results(
    folder: Path,
    records: Sequence[dict[str, Any]],
    *,
    baseline: str | Path | None,
    dtype: str | None,
    device: torch.device,
    **libraries: str,
) -> None:
    """Add records to the folder; they replace older ones of the same task and metric.

    Args:
        folder: A folder that `results_folder` returned.
        records: What was measured.
        baseline: The model measured beside it; its name is noted, not its path.
        dtype: The precision asked for, None for that of the checkpoints.
        device: Where it was measured; its type is noted.
        libraries: Further names and versions of software beside those of `versions`.
    """
    circumstances = {
        "baseline": find_model(baseline)[1] if baseline is not None else None,
        "dtype": dtype or "as stored",
        "device": device.type,
        "versions": {**versions(), **libraries},
    }
    new = {(record["task"], record["metric"]): {**record, **circumstances} for record in records}
    kept = [it for it in recorded(folder) if (it["task"], it["metric"]) not in new]
    content = {"results": [*kept, *new.values()]}
    replace_file(folder / RESULTS_FILE, to_json(content, indent=2) + "\n")

    card = ModelCard.load(folder / CARD_FILE)
    older = card.data.eval_results or []
    older = [it for it in older if (it.dataset_type, it.metric_type) not in new]
    card.data.eval_results = [*older, *map(eval_result, new.values())]
    card.data.model_name = card.data.model_name or folder.resolve().name
    text = str(card)
    for record in new.values():
        if record["metric"] == "perplexity":
            dense = record.get("baseline_value")
            beside = "" if dense is None else f" (dense {dense:.2f})"
            text = with_perplexity(text, f"**{record['value']:.2f}**{beside} on `{record['task']}`")
    replace_file(folder / CARD_FILE, text)


def eval_result(record: dict[str, Any]) -> EvalResult:
    """Return a record in the Hub's terms; its conditions are in the name that people see."""
    task = record["task"]
    conditions = {name: record[name] for name in CONDITIONS if record.get(name) is not None}
    words = ", ".join(CONDITIONS[name].format(value) for name, value in conditions.items())
    return EvalResult(
        task_type="text-generation",
        dataset_type=task,
        dataset_name=f"{task} ({words})" if words else task,
        dataset_args=conditions or None,
        metric_type=record["metric"],
        metric_value=record["value"],
    )


def recorded(folder: Path) -> list[dict[str, Any]]:
    """Return the records that the folder has already."""
    path = folder / RESULTS_FILE
    if not path.is_file():
        return []
    records = json.loads(path.read_text(encoding="utf-8"))["results"]
    for record in records:
        record["task"], record["metric"]  # KeyError here, not after hours of measuring
    return records
