# SPDX-License-Identifier: Apache-2.0
"""The verb `report`: one self-contained HTML page of figures about a carved model.

Shape suffixes: W windows, L tokens of one window, T tokens.
"""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..device import check_dtype, find_device, name_of, versions
from ..errors import CMoEError, RequestError
from ..folder.card import CARD_FILE, FIGURES, with_section
from ..folder.paths import replace_file
from ..folder.strict import to_json
from ..measure.evaluate import text_windows
from ..measure.routing import check_flat, sparse_blocks
from ..source.calibration import tokenize
from ..source.checkpoint import fetch_model, find_model
from ..source.loading import load_model
from ..source.texts import open_text
from .figures import FILES, check_drawing, draw_figures
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


def report(
    model: str | Path,
    *,
    text: str | Path = "wikitext2",
    sequence_length: int | None = None,
    windows: int = 16,
    sample: str | None = None,
    output: str | Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    card: bool = True,
) -> Report:
    """Watch a carved model on a text and write a page of figures, with a PNG file of each.

    Args:
        model: Folder of a carved model, or a Hub id if `output` is given.
        text: Text file, `wikitext2`, `c4` or a Hub data set (their test parts).
        sequence_length: Window length in tokens, default 2,048 or the model's context.
        windows: Windows of the text to run, from its beginning.
        sample: A sentence whose way through the experts the page shows, at most 200 tokens.
        output: Folder of the page, default `report` in the model's folder. One that holds an
            earlier report is replaced.
        dtype, device, trust_remote_code: See `evaluate`.
        card: Show two of the figures in the model's README.md; only without `output`.

    Raises:
        RequestError: The request cannot be satisfied; nothing was written.
        CMoEError: A model or text cannot be reached, yields NaN, or the page cannot be written.
    """
    check_drawing("a report")
    check_dtype(dtype)
    where = find_device(device)
    if windows < 1:
        raise RequestError(f"--windows is {windows}; it must be at least 1.")
    folder, name, commit = find_model(model)
    check_flat(folder)
    if commit is not None:
        if output is None:
            raise RequestError(f"{name} is on the Hub: give --output, the folder for the page.")
        folder = fetch_model(name, commit)
    conversion = read_conversion(folder)
    opened = open_text(text, part="test")
    target = folder / "report" if output is None else Path(output).expanduser()
    with fresh_folder(target.absolute()) as new:
        carved, tokenizer = load_model(model, dtype, where, trust_remote_code)
        if not sparse_blocks(carved):
            raise RequestError(f"{model} is not a carved model: there is nothing to show.")
        windows_WL = text_windows(carved, tokenizer, opened, sequence_length, windows)
        ids_T = sample_ids(carved, tokenizer, SAMPLE if sample is None else sample)
        measured = {
            "text": opened.name,
            "tokens": windows_WL.numel(),
            "sequence_length": windows_WL.shape[1],
            "dtype": name_of(carved.dtype),
            "device": where.type,
        }
        data = {
            "model": {"name": name, **describe_model(carved)},
            "source": describe_source(conversion),
            "measured": measured,
            "versions": versions(),
            **describe_observation(observe(carved, windows_WL), conversion),
            "sample": {
                "tokens": token_texts(tokenizer, ids_T),
                "layers": [asdict(layer) for layer in observe_sample(carved, ids_T)],
            },
        }
        figures = write_page(data, new)
    if card and output is None:
        show_in_card(folder / CARD_FILE, figures, measured)
    page, tokens = str(target / PAGE), windows_WL.numel()
    return Report(output=page, figures=figures, perplexity=data["perplexity"], tokens=tokens)


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
    # Names that nobody else would use: what is there is left over from a killed run.
    new, old = (target.with_name(f".{target.name}.cmoe-report-{end}") for end in ("new", "old"))
    try:
        if target.exists() and not is_replaceable(target):
            raise RequestError(
                f"{target.name} exists and is not a report: choose another --output, or remove it."
            )
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
        new.mkdir(parents=True)
    except OSError as error:
        raise RequestError(f"cannot create the folder {target.name}: {error.strerror}.") from error
    try:
        yield new
        if target.exists():
            target.rename(old)
        new.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)


def is_replaceable(folder: Path) -> bool:
    """Whether there is an empty folder, or an earlier report and nothing else."""
    names = {path.name for path in folder.iterdir()}
    ours = PAGE in names and GENERATOR in (folder / PAGE).read_text(encoding="utf-8")
    return not names or (ours and names <= {PAGE, *FILES})


def write_page(data: dict[str, Any], folder: Path) -> list[str]:
    """Write the page and draw the figures; return their names."""
    try:
        (folder / PAGE).write_text(page(data), encoding="utf-8")
        return draw_figures(data, folder)
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
