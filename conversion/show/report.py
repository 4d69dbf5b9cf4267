# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page of figures about a carved model.

Shape suffixes: W windows, L tokens of one window, T tokens.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..device import DTYPES, find_device, name_of, versions
from ..errors import CMoEError, RequestError, check_at_least, check_known
from ..folder.card import CARD_FILE, FIGURES, with_section
from ..folder.json_utils import to_json
from ..folder.paths import check_place, remove, replace_file, resolved
from ..measure.benchmark import benchmark
from ..measure.evaluate import check_same_vocabulary, common_length, text_windows
from ..measure.routing import check_dense, sparse_blocks
from ..options import LoadOptions, narrowed, with_options
from ..source.calibration import tokenize
from ..source.hub import find_model
from ..source.loading import load_model
from ..source.texts import open_text
from .figures import CARD_FIGURES, check_drawing, draw_figures
from .gains import CarvedModel, figures_of, gains, layer_errors, look_up
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
EARLIER_FIGURES = (
    *("routing-overview.png", "router-agreement.png", "imbalance.png", "mass.png"),
    *("activation-rate.png", "hidden-values.png"),
)
"""Beside the pages of earlier releases: a new report removes them."""


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
    """The dense model: how far it is away on the same text, and the speed of both."""
    compare: str | Path | None = None
    """Another carved model of the same source, side by side."""
    text: str | Path = "wikitext2"
    """Text file, wikitext2, c4 or a Hub data set (their test parts) to watch it on."""
    sequence_length: int | None = None
    """Tokens per window; default 2,048, or the model's context if shorter."""
    windows: int = 16
    """Windows of the text, from its beginning."""
    rounds: int = 5
    """Timed runs, dense and carved in turn; 0 for none."""
    sample: str | None = None
    """A sentence to follow through the experts, at most 200 tokens."""
    output: str | Path | None = None
    """Folder for the page, default report in the model's; an earlier report is replaced."""
    figures: bool = True
    """Draw the two PNG files of the card, which need the extra `[report]`."""
    card: bool = True
    """Show them in the README.md of the model; only without an output folder."""


@with_options(ReportOptions)
def report(options: ReportOptions) -> Report:
    """Watch a carved model on a text and write a page of figures.

    Raises:
        RequestError: The request cannot be satisfied; nothing was written.
        CMoEError: A model or text cannot be reached, yields NaN, or the page cannot be written.
    """
    if options.figures:
        check_drawing("a report")
    check_known("dtype", options.dtype, DTYPES)
    where = find_device(options.device)
    check_at_least(1, windows=options.windows)
    check_at_least(0, rounds=options.rounds)
    folder, name, commit = find_model(options.model)
    if commit is not None and options.output is None:
        raise RequestError(f"{name} is on the Hub: give --output, the folder for the page.")
    asked = [each for each in (options.model, options.compare) if each is not None]
    places = [look_up(each) for each in asked]
    if options.baseline is not None:
        find_model(options.baseline)
    opened = open_text(options.text, part="test")
    trusted = options.trust_remote_code
    length = common_length(options.sequence_length, trusted, *asked, options.baseline)
    target = folder / "report" if options.output is None else resolved(options.output)
    check_target(target)
    load = partial(load_model, dtype=options.dtype, device=where, trust_remote_code=trusted)

    dense: PreTrainedModel | None = None
    carved, tokenizer = load_carved(load, options.model)
    if options.baseline is not None:
        dense, theirs = load(options.baseline)
        check_dense(dense, options.baseline)
        check_same_vocabulary(options.baseline, theirs, tokenizer)
    windows_WL = text_windows(carved, tokenizer, opened, length, options.windows)
    ids_T = sample_ids(carved, tokenizer, SAMPLE if options.sample is None else options.sample)
    observation = observe(carved, windows_WL, dense)
    data = page_data(carved, tokenizer, places[0], observation, ids_T)
    data["measured"] |= {"text": opened.name, "sequence_length": length}
    models = [figures_of(places[0], carved, observation)]
    del carved  # one carved model in memory at a time
    for place in places[1:]:
        carved, theirs = load_carved(load, place.model)
        check_same_vocabulary(place.model, theirs, tokenizer)
        models.append(figures_of(place, carved, observe(carved, windows_WL, dense)))
        del carved
    speeds: list[float | None] = []
    if dense is not None:
        del dense
        speeds = decoding_speeds(asked, options) if options.rounds else []
    data["gains"] = gains(models, f"{windows_WL.numel():,} tokens of {opened.name}", speeds)
    drawn = draw_figures(data) if options.figures else {}
    write_files(target, {PAGE: page(data).encode(), **drawn})
    if options.card and options.output is None:
        show_in_card(folder / CARD_FILE, list(drawn), data["measured"])
    return Report(
        output=str(target / PAGE),
        figures=list(drawn),
        perplexity=observation.quality.perplexity,
        tokens=windows_WL.numel(),
        gains=data["gains"],
    )


def load_carved(
    load: Callable[[str | Path], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    model: str | Path,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model and its tokenizer. Raise `RequestError` if it is not carved."""
    carved, tokenizer = load(model)
    if not sparse_blocks(carved):
        raise RequestError(f"{model} is not a carved model: there is nothing to show.")
    return carved, tokenizer


def decoding_speeds(models: Sequence[str | Path], options: ReportOptions) -> list[float | None]:
    """Return tokens a second of the dense model and of the carved ones, decoding one sequence."""
    loading = vars(narrowed(options, LoadOptions))
    sizes: dict[str, Any] = {"tokens": (), "prefill": (), "batch": (1,), "rounds": options.rounds}
    points = [
        benchmark(each, baseline=options.baseline, **sizes, **loading).decode[0] for each in models
    ]
    return [1000 / points[0].dense_ms, *(1000 / point.carved_ms for point in points)]


def sample_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: str
) -> torch.Tensor:
    """Return token ids (T,) of the sample. Raise `RequestError` if they are none or too many."""
    if not sample.strip():
        raise RequestError("--sample is empty: give a sentence.")
    ids_T = tokenize(tokenizer, sample)
    most = min(MAX_SAMPLE, getattr(model.config, "max_position_embeddings", MAX_SAMPLE))
    if len(ids_T) > most:
        raise RequestError(f"--sample has {len(ids_T)} tokens; at most {most} can be shown.")
    return ids_T


def page_data(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    place: CarvedModel,
    observation: Observation,
    ids_T: torch.Tensor,
) -> dict[str, Any]:
    """Return what the page shows of a model that was observed, and of the tokens of a sample."""
    config = model.config
    routed, active = config.num_experts, config.num_experts_per_tok
    errors = layer_errors(place.conversion, len(observation.layers))
    layers = [
        {**layer, "relative_output_error": error}
        for layer, error in zip(observation.layers, errors, strict=True)
    ]
    return {
        "model": {
            "name": place.name,
            "notation": config.notation,
            "activation_ratio": config.activation_ratio,
            "dense_layers": config.dense_layers or [],
            "shared": config.num_shared,
            "routed": routed,
            "active": active,
            "experts": config.num_shared + routed,
            "chance": 1 / math.comb(routed, active) if active else None,
        },
        "source": describe_source(place.conversion),
        "measured": {
            "tokens": observation.tokens,
            "dtype": name_of(model.dtype),
            "device": model.device.type,
        },
        "versions": versions(),
        **observation.quality._asdict(),
        "marked": observation.marked,
        "layers": layers,
        "sample": {
            "tokens": token_texts(tokenizer, ids_T),
            "layers": observe_sample(model, ids_T),
        },
    }


def describe_source(conversion: dict[str, Any]) -> dict[str, Any] | None:
    """Return where the model comes from, as far as its conversion says so."""
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


def check_target(target: Path) -> None:
    """Raise `RequestError` if the page cannot be written there, or would replace anything else."""
    page, names = target / PAGE, set()
    if target.is_dir():
        names = {path.name.removesuffix(".new") for path in target.iterdir()}
    ours = page.is_file() and GENERATOR in page.read_text(encoding="utf-8", errors="replace")
    known = {PAGE, *CARD_FIGURES, *EARLIER_FIGURES} if ours else set()
    if names - known or target.is_file():
        raise RequestError(
            f"{target.name} exists and is not a report: choose another --output, or remove it."
        )
    check_place(page)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of a report, and remove those of an earlier one. Raise `CMoEError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            replace_file(folder / name, content)
        remove(path for path in folder.iterdir() if path.name not in files)
    except OSError as error:
        raise CMoEError(f"cannot write the report: {error.strerror}.") from error


def page(data: dict[str, Any]) -> str:
    """Return the template with the data in it."""
    content = to_json(shortened(data), separators=(",", ":"))
    # A browser ends the script at `</script` and hides it behind `<!--`, even in a string.
    content = content.replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACEHOLDER, content)


def shortened(value: Any) -> Any:
    """Return plain data with five significant digits of every float."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: shortened(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [shortened(part) for part in value]
    return value


def show_in_card(card: Path, figures: list[str], measured: dict[str, Any]) -> None:
    """Show figures in a model card, in place of those of an earlier report."""
    if not card.is_file():
        return
    images = [f"![{what}](report/{name})" for name, what in CARD_FIGURES.items() if name in figures]
    text = (
        f"On {measured['tokens']:,} tokens of `{measured['text']}`; all figures are in "
        "[report/index.html](report/index.html)."
    )
    with open(card, encoding="utf-8", newline="") as file:  # line ends stay as they are
        content = with_section(file.read(), FIGURES, "\n\n".join(["## Figures", text, *images]))
    replace_file(card, content)
