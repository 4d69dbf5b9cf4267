# SPDX-License-Identifier: Apache-2.0
"""Perplexity, dense beside carved, and how good the router is.

Shape suffixes: B windows of a batch, W windows, L tokens of one window.
"""

import math
import sys
from contextlib import ExitStack
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..device import check_dtype, find_device
from ..errors import CMoEError, RequestError, check_at_least
from ..folder.results import results_folder, write_results
from ..options import LoadOptions, with_options
from ..source.calibration import check_vocabulary, consecutive_windows, read_tokens
from ..source.loading import load_config, load_model, window_length
from ..source.texts import Text, open_text, text_name
from .routing import replace_router, routing_blocks, watch_router

ROUTERS = ("own", "oracle", "random")
TOKENS_AT_ONCE, LOGITS_AT_ONCE = 4096, 2**28
"""Bounds of a batch; of a vocabulary as large as Gemma's the second counts."""
HIGHEST_LOSS = math.log(sys.float_info.max)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured; the keys of `cmoe evaluate --json`."""

    perplexity: float
    tokens: int
    """Predicted tokens, L - 1 of every window."""
    sequence_length: int
    windows: int | None
    """Only so many, from the beginning of the text; None for all of it."""
    baseline_perplexity: float | None
    """Of the dense model on the same windows, None without `baseline`."""
    router: str
    """Who routed: `"own"`, `"oracle"` or `"random"`."""
    router_oracle_agreement: float | None
    """Share of tokens, averaged over layers, whose experts are exactly the oracle's choice, the
    ones of largest sum |h|. None for a model that does not route, and for a replaced router."""
    router_chance_agreement: float | None
    """That of a router which picks at random: 1 / C(Nr, A)."""


@dataclass(frozen=True)
class EvaluateOptions(LoadOptions):
    """The options of `evaluate`."""

    model: str | Path
    """Folder or Hub id of a carved or dense model."""
    _: KW_ONLY
    baseline: str | Path | None = None
    """The dense model, measured in the same run; it must share the tokenizer."""
    text: str | Path = "wikitext2"
    """Text file, wikitext2, c4 or a Hub data set (their test parts)."""
    sequence_length: int | None = None
    """Tokens per window; default 2,048 or the model's context."""
    windows: int | None = None
    """Only the first windows of the text, for a quick look."""
    router: str = "own"
    """Who routes: own (the model's router), oracle (the experts of largest sum |h|, a bound), or
    random."""
    seed: int = 0
    """Seed of the random router."""
    card: bool = False
    """Write the results into `evaluation.json` and the card in the model's folder."""


@with_options(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> Evaluation:
    """Measure the perplexity of a model, and of its dense baseline in the same run.

    The text is tokenised once with the model's tokenizer, in pieces if it has
    `calibration.WHOLE_CHARACTERS` or more, and cut into consecutive windows; the last partial one
    is dropped. Perplexity is exp of the mean negative log-likelihood over the L - 1 predicted
    tokens of every window.

    Raises:
        RequestError: The request cannot be satisfied.
        CMoEError: A model or text cannot be reached, or yields NaN.
    """
    router = options.router
    if router not in ROUTERS:
        raise RequestError(f"there is no router {router!r}; choose one of {', '.join(ROUTERS)}.")
    check_at_least(1, windows=options.windows)
    check_dtype(options.dtype)
    where = find_device(options.device)
    folder = results_folder(options.model) if options.card else None
    if options.card and router != "own":
        raise RequestError(f"--card states what the model itself does, not with router {router!r}.")
    text = open_text(options.text, part="test")
    models, trusted = (options.model, options.baseline), options.trust_remote_code
    length = common_length(options.sequence_length, trusted, *models)
    carved, tokenizer = load_model(options.model, options.dtype, where, trusted)
    windows_WL = text_windows(carved, tokenizer, text, length, options.windows)
    figures = measure_routing(carved, windows_WL, router, options.seed)
    dense_perplexity = None
    if options.baseline is not None:
        del carved  # one model in memory at a time
        dense, other = load_model(options.baseline, options.dtype, where, trusted)
        check_same_vocabulary(options.baseline, other, tokenizer)
        check_vocabulary(windows_WL, dense.config.vocab_size)
        dense_perplexity = perplexity(dense, windows_WL, description="baseline")
    result = Evaluation(
        perplexity=figures[0],
        tokens=windows_WL[:, 1:].numel(),
        sequence_length=length,
        windows=options.windows,
        baseline_perplexity=dense_perplexity,
        router=router,
        router_oracle_agreement=figures[1],
        router_chance_agreement=figures[2],
    )
    if folder is not None:
        record = {"task": text_name(options.text), "metric": "perplexity", **asdict(result)}
        del record["router"]  # the model's own
        record["value"] = record.pop("perplexity")
        record["baseline_value"] = record.pop("baseline_perplexity")
        dtype = options.dtype
        write_results(folder, [record], baseline=options.baseline, dtype=dtype, device=where)
    return result


def check_same_vocabulary(
    other: str | Path, theirs: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase
) -> None:
    """Raise `RequestError` if the perplexities of two models cannot be compared."""
    if theirs.get_vocab() != ours.get_vocab():
        raise RequestError(
            f"{other} has another vocabulary: the perplexities cannot be compared. Give a model "
            "of the same source."
        )


def common_length(asked: int | None, trust_remote_code: bool, *models: str | Path | None) -> int:
    """Return the length of the windows that all models are measured on. Raises `RequestError`."""
    first, *rest = (load_config(it, trust_remote_code) for it in models if it is not None)
    length = window_length(first, asked, *rest)
    if length < 2:
        raise RequestError(f"--sequence-length is {length}: a window needs at least 2 tokens.")
    return length


def text_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    length: int,
    most: int | None,
) -> torch.Tensor:
    """Return the first windows of a text, (W, L). Raise `RequestError` if it is too short."""
    least = None if most is None else most * length
    read = read_tokens(text, tokenizer, model.config.vocab_size, least_tokens=least)
    return consecutive_windows(read.ids, length=length)[:most]


def measure_routing(
    model: PreTrainedModel, windows_WL: torch.Tensor, router: str, seed: int
) -> tuple[float, float | None, float | None]:
    """Return perplexity under a router, agreement of the own one with the oracle, and chance.

    The agreement is None for a replaced router; both are None for a model that does not route.
    """
    routed = routing_blocks(model)
    if not routed:
        if router != "own":
            raise RequestError(f"the model does not route, so it cannot have a router {router!r}.")
        return perplexity(model, windows_WL, description="model"), None, None
    agreements = []
    with ExitStack() as stack:
        for index, block in enumerate(routed):
            if router == "own":
                agreements += stack.enter_context(watch_router(block))
            else:
                stack.enter_context(replace_router(block, router, seed + index))
        measured = perplexity(model, windows_WL, description="model")
    own = fmean(fmean(layer) for layer in agreements) if agreements else None
    return measured, own, 1 / math.comb(*routed[0].gate.choice)


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, windows_WL: torch.Tensor, *, description: str = "perplexity"
) -> float:
    """Return exp of the mean negative log-likelihood of the L - 1 predicted tokens of a window.

    Raises `CMoEError` if the model yields NaN.
    """
    windows, length = windows_WL.shape
    total = 0.0
    most = min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // model.config.vocab_size)
    batches = windows_WL.split(max(1, most // length))
    for ids_BL in tqdm(batches, desc=description, disable=None):
        ids_BL = ids_BL.to(model.device)
        logits_BLV = model(input_ids=ids_BL, use_cache=False).logits[:, :-1]
        for logits_LV, next_L in zip(logits_BLV, ids_BL[:, 1:], strict=True):
            nll = F.cross_entropy(logits_LV.float(), next_L, reduction="sum")
            total += nll.item()
    if not math.isfinite(total):
        raise CMoEError(
            "the model yields NaN on this text: its weights are damaged or its precision "
            "overflows. Try --dtype float32."
        )
    mean = total / (windows * (length - 1))
    if mean > HIGHEST_LOSS:
        raise CMoEError(
            f"the model's mean loss on this text is {mean:.3g}: no number is as large as its "
            "perplexity. Its weights are damaged, or it is another model's tokenizer."
        )
    return math.exp(mean)
