# SPDX-License-Identifier: Apache-2.0
"""The verb `report`: one self-contained HTML page of figures about a carved model.

Shape suffixes: W windows, L tokens of one window, T tokens.
"""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..device import check_dtype, find_device, name_of, versions
from ..errors import CMoEError, RequestError
from ..folder.card import CARD_FILE, FIGURES, with_section
from ..folder.paths import replace_file, replace_folder, resolved
from ..folder.strict import to_json
from ..measure.evaluate import check_same_vocabulary, common_length, text_windows
from ..measure.routing import check_flat, sparse_blocks
from ..options import LoadOptions, with_options
from ..source.calibration import tokenize
from ..source.checkpoint import fetch_model, find_model
from ..source.loading import load_model
from ..source.texts import open_text
from .figures import FILES, check_drawing, draw_figures
from .gains import (
    Figures,
    Loaded,
    Loader,
    decoding_speed,
    dense_perplexity,
    figures_of,
    gains,
    recorded_results,
)
from .observe import Observation, observe, observe_sample, token_texts

TEMPLATE = Path(__file__).parent.parent / "assets" / "report.html"
PAGE = "index.html"
PLACEHOLDER = "__DATA__"
GENERATOR = 'name="generator" content="cmoe-hf"'
MAX_SAMPLE = 200
"""Tokens of the sample: more could not be read, and the page stays small."""
SAMPLE = (
    "In 1969 three astronauts left for the Moon, 384,400 km away. The rocket weighed 2,900 tonnes, "
    'and most of that was fuel. "How far is it?" asked a child. Nobody answered; the crowd had '
    "fallen silent, as crowds do when something begins."
)
"""Read by every model unless another sample is given, so that their pages compare."""
FIGURES_IN_CARD = {
    "expert-load.png": "share of the tokens that run each expert",
    "reconstruction-error.png": "error of the FFN output of each layer",
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was written; the keys of `cmoe report --json`."""

    output: str
    """The page."""
    figures: list[str]
    """PNG files beside it."""
    perplexity: float
    tokens: int
    """Tokens that the model was watched on."""
    gains: dict[str, Any]
    """The table that the page opens with: names of the columns, and rows of values."""


@dataclass(frozen=True)
class ReportOptions(LoadOptions):
    """The options of `report`."""

    model: str | Path
    """Folder of a carved model, or a Hub id if there is an output folder."""
    _: KW_ONLY
    baseline: str | Path | None = None
    """The dense model: its perplexity on the same text, and the speed of both."""
    compare: str | Path | None = None
    """Another carved model of the same source, side by side."""
    text: str | Path = "wikitext2"
    """Text file, wikitext2, c4 or a Hub data set (their test parts) to watch it on."""
    sequence_length: int | None = None
    """Tokens per window; default 2,048 or the model's context."""
    windows: int = 16
    """Windows of the text, from its beginning."""
    rounds: int = 5
    """Timed runs, dense and carved in turn; 0 for none."""
    sample: str | None = None
    """A sentence to follow through the experts, at most 200 tokens."""
    output: str | Path | None = None
    """Folder for the page, default report in the model's; an earlier report is replaced."""
    figures: bool = True
    """Draw PNG files beside the page, which need the extra `[report]`."""
    card: bool = True
    """Show two of the figures in the model's README.md; only without an output folder."""


@with_options(ReportOptions)
def report(options: ReportOptions) -> Report:
    """Watch a carved model on a text and write a page of figures, with a PNG file of each.

    Raises:
        RequestError: The request cannot be satisfied; nothing was written.
        CMoEError: A model or text cannot be reached, yields NaN, or the page cannot be written.
    """
    model, baseline, compare = options.model, options.baseline, options.compare
    text, sequence_length, windows = options.text, options.sequence_length, options.windows
    rounds, sample, output = options.rounds, options.sample, options.output
    figures, card, dtype, device = options.figures, options.card, options.dtype, options.device
    trust_remote_code = options.trust_remote_code
    if figures:
        check_drawing("a report")
    check_dtype(dtype)
    where = find_device(device)
    for option, count, least in (("windows", windows, 1), ("rounds", rounds, 0)):
        if count < least:
            raise RequestError(f"--{option} is {count}; it must be at least {least}.")
    folder, name, commit = find_model(model)
    if commit is not None and output is None:
        raise RequestError(f"{name} is on the Hub: give --output, the folder for the page.")
    given = [model] if compare is None else [model, compare]
    places = [look_up(each) for each in given]
    for other in (baseline, compare):
        if other is not None:
            find_model(other)
    opened = open_text(text, part="test")
    length = common_length(sequence_length, trust_remote_code, model, baseline, compare)
    target = folder / "report" if output is None else resolved(output)
    load = partial(load_model, dtype=dtype, device=where, trust_remote_code=trust_remote_code)
    with fresh_folder(target.absolute()) as new:
        carved, tokenizer = load_carved(load, model)
        windows_WL = text_windows(carved, tokenizer, opened, length, windows)
        ids_T = sample_ids(carved, tokenizer, SAMPLE if sample is None else sample)
        observation = observe(carved, windows_WL)
        measured = {
            "text": opened.name,
            "tokens": windows_WL.numel(),
            "sequence_length": windows_WL.shape[1],
            "dtype": name_of(carved.dtype),
            "device": where.type,
        }
        data = {
            "model": {"name": name, **describe_model(carved)},
            "source": describe_source(places[0].conversion),
            "measured": measured,
            "versions": versions(),
            **describe_observation(observation, places[0].conversion),
            "sample": {
                "tokens": token_texts(tokenizer, ids_T),
                "layers": [asdict(layer) for layer in observe_sample(carved, ids_T)],
            },
        }
        known = [places[0].figures(carved, observation)]
        del carved  # one model in memory at a time
        if compare is not None:
            known.append(other_figures(load, compare, places[1], tokenizer, windows_WL))
        dense = None
        if baseline is not None:
            dense = dense_perplexity(load, baseline, tokenizer, windows_WL)
        if baseline is not None and rounds:
            time = partial(
                decoding_speed,
                baseline=baseline,
                rounds=rounds,
                dtype=dtype,
                device=device,
                trust_remote_code=trust_remote_code,
            )
            known = [replace(it, speed=time(one)) for it, one in zip(known, given, strict=True)]
        data["gains"] = gains(known, dense, f"{measured['tokens']:,} tokens of {opened.name}")
        drawn = write_page(data, new, figures)
    if card and output is None:
        show_in_card(folder / CARD_FILE, drawn, measured)
    page, tokens = str(target / PAGE), windows_WL.numel()
    return Report(
        output=page,
        figures=drawn,
        perplexity=known[0].perplexity,
        tokens=tokens,
        gains=data["gains"],
    )


@dataclass(frozen=True)
class Place:
    """A carved model before it is loaded: where it is, its name, what its conversion noted."""

    folder: Path
    name: str
    conversion: dict[str, Any]

    def figures(self, model: PreTrainedModel, observation: Observation) -> Figures:
        """What is known of it."""
        described = describe_observation(observation, self.conversion)["layers"]
        errors = [layer["relative_output_error"] for layer in described]
        return figures_of(self.name, self.folder, model, observation, errors)


def look_up(model: str | Path) -> Place:
    """Find a carved model and read what is beside its weights. Raises `RequestError`."""
    folder, name, commit = find_model(model)
    check_flat(folder)
    if commit is not None:
        folder = fetch_model(name, commit)
    recorded_results(folder)
    return Place(folder, name, read_conversion(folder))


def load_carved(load: Loader, model: str | Path) -> Loaded:
    """The model and its tokenizer. Raises `RequestError` if it is not carved."""
    carved, tokenizer = load(model)
    if not sparse_blocks(carved):
        raise RequestError(f"{model} is not a carved model: there is nothing to show.")
    return carved, tokenizer


def other_figures(
    load: Loader,
    model: str | Path,
    place: Place,
    tokenizer: PreTrainedTokenizerBase,
    windows_WL: torch.Tensor,
) -> Figures:
    """Of the model to compare with, on the same windows. Raises `RequestError`."""
    carved, theirs = load_carved(load, model)
    check_same_vocabulary(model, theirs, tokenizer)
    return place.figures(carved, observe(carved, windows_WL))


def sample_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: str
) -> torch.Tensor:
    """Token ids (T,) of the sample. Raises `RequestError` if they are none or too many."""
    if not sample.strip():
        raise RequestError("--sample is empty: give a sentence.")
    ids_T = tokenize(tokenizer, sample)
    most = min(MAX_SAMPLE, model.config.max_position_embeddings)
    if len(ids_T) > most:
        raise RequestError(f"--sample has {len(ids_T)} tokens; at most {most} can be shown.")
    return ids_T


def read_conversion(folder: Path) -> dict[str, Any]:
    """The content of conversion.json, empty if there is none. Raises `RequestError`."""
    path = folder / "conversion.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(
            f"conversion.json is damaged ({error}). Without it the page can be made: remove it."
        ) from error
    return content if isinstance(content, dict) else {}


def describe_model(model: PreTrainedModel) -> dict[str, Any]:
    """The shape of the model, and how often chance would agree with the oracle."""
    config = model.config
    routed, active = config.num_experts, config.num_experts_per_tok
    return {
        "notation": config.notation,
        "activation_ratio": config.activation_ratio,
        "dense_layers": config.dense_layers or [],
        "shared": config.num_shared,
        "routed": routed,
        "active": active,
        "experts": config.num_shared + routed,
        "chance": 1 / math.comb(routed, active) if active else None,
    }


def describe_source(conversion: dict[str, Any]) -> dict[str, Any] | None:
    """Where the model comes from, as far as its conversion says so."""
    try:
        return {
            "name": conversion["source"]["name"],
            "revision": conversion["source"]["revision"],
            "recipe": conversion["settings"]["recipe"],
            "calibration": conversion["calibration"]["source"],
            "calibration_tokens": conversion["calibration"]["tokens"],
        }
    except (KeyError, TypeError):
        return None  # written by another version


def describe_observation(observation: Observation, conversion: dict[str, Any]) -> dict[str, Any]:
    """What was measured, with the error of each layer that the conversion has measured."""
    layers = [asdict(layer) for layer in observation.layers]
    known = conversion.get("layers")
    if isinstance(known, list):
        known = [
            figures for figures in known if not (isinstance(figures, dict) and "dense" in figures)
        ]
    known = known if isinstance(known, list) and len(known) == len(layers) else [{}] * len(layers)
    for layer, figures in zip(layers, known, strict=True):
        error = figures.get("relative_output_error") if isinstance(figures, dict) else None
        usable = isinstance(error, float | int) and math.isfinite(error)
        layer["relative_output_error"] = error if usable else None
    return {"perplexity": observation.perplexity, "marked": observation.marked, "layers": layers}


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """A new folder that takes the place of `target` when the block ends well, else vanishes.

    Raises `RequestError` if it cannot be made or would replace anything but an earlier report.
    """
    # A name that nobody else would use: what is there is left over from a killed run.
    beside = target.with_name(f".{target.name}.cmoe")
    try:
        if target.exists() and not is_replaceable(target):
            raise RequestError(
                f"{target.name} exists and is not a report: choose another --output, or remove it."
            )
        shutil.rmtree(beside, ignore_errors=True)
        (beside / "new").mkdir(parents=True)
    except OSError as error:
        raise RequestError(f"cannot create the folder {target.name}: {error.strerror}.") from error
    try:
        yield beside / "new"
        replace_folder(beside / "new", target, beside / "old")
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def is_replaceable(folder: Path) -> bool:
    """Whether there is an empty folder, or an earlier report and nothing else."""
    names = {path.name for path in folder.iterdir()}
    ours = PAGE in names and GENERATOR in (folder / PAGE).read_text(encoding="utf-8")
    return not names or (ours and names <= {PAGE, *FILES})


def write_page(data: dict[str, Any], folder: Path, figures: bool) -> list[str]:
    """Write the page and draw the figures; return their names."""
    try:
        (folder / PAGE).write_text(page(data), encoding="utf-8")
        return draw_figures(data, folder) if figures else []
    except OSError as error:
        raise CMoEError(f"cannot write the report: {error.strerror}.") from error


def page(data: dict[str, Any]) -> str:
    """The template with the data in it."""
    content = to_json(shortened(data), separators=(",", ":"))
    # A browser ends the script at `</script` and hides it behind `<!--`, even in a string.
    content = content.replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACEHOLDER, content)


def shortened(value: Any) -> Any:
    """The same with five significant digits of every float."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: shortened(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [shortened(part) for part in value]
    return value


def show_in_card(card: Path, figures: list[str], measured: dict[str, Any]) -> None:
    """Show some of the figures in a model card, in place of those of an earlier report."""
    if not card.is_file():
        return
    images = [
        f"![{what}](report/{name})" for name, what in FIGURES_IN_CARD.items() if name in figures
    ]
    told = f"On {measured['tokens']:,} tokens of `{measured['text']}`; all figures are in "
    told += "[report/index.html](report/index.html)."
    with open(card, encoding="utf-8", newline="") as file:  # line ends stay as they are
        text = with_section(file.read(), FIGURES, "\n\n".join(["## Figures", told, *images]))
    replace_file(card, text)
