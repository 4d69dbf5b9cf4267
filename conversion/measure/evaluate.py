# SPDX-License-Identifier: Apache-2.0
"""Perplexity and divergence, dense beside carved, and how good the router is.

Shape suffixes: B windows of a batch, W windows, L tokens of one window.
"""

import math
import sys
from contextlib import ExitStack
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..device import DTYPES, find_device
from ..errors import CMoEError, RequestError, check_at_least, check_known
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


class Quality(NamedTuple):
    """How well a model predicts a text, and how close it is to its baseline, if there is one."""

    perplexity: float
    baseline_perplexity: float | None = None
    divergence: float | None = None
    """Mean KL(baseline || model), in nats per token."""
    agreement: float | None = None
    """Share of tokens of which both find the same next token most likely."""


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
    divergence: float | None
    """Mean KL(baseline || model) of the distributions of the next token, in nats."""
    agreement: float | None
    """Share of the predicted tokens of which both models find the same most likely."""
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
    """Tokens per window; default 2,048, or the model's context if shorter."""
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
    check_known("router", router, ROUTERS)
    check_at_least(1, windows=options.windows)
    check_known("dtype", options.dtype, DTYPES)
    where = find_device(options.device)
    folder = results_folder(options.model) if options.card else None
    if options.card and router != "own":
        raise RequestError(f"--card states what the model itself does, not with router {router!r}.")
    text = open_text(options.text, part="test")
    models, trusted = (options.model, options.baseline), options.trust_remote_code
    length = common_length(options.sequence_length, trusted, *models)
    carved, tokenizer = load_model(options.model, options.dtype, where, trusted)
    windows_WL = text_windows(carved, tokenizer, text, length, options.windows)
    dense = None
    if options.baseline is not None:
        dense, other = load_model(options.baseline, options.dtype, where, trusted)
        check_same_vocabulary(options.baseline, other, tokenizer)
        check_vocabulary(windows_WL, dense.config.vocab_size)
    measured, own, chance = measure_routing(carved, windows_WL, router, options.seed, dense)
    result = Evaluation(
        tokens=windows_WL[:, 1:].numel(),
        sequence_length=length,
        windows=options.windows,
        router=router,
        router_oracle_agreement=own,
        router_chance_agreement=chance,
        **measured._asdict(),
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
    model: PreTrainedModel,
    windows_WL: torch.Tensor,
    router: str,
    seed: int,
    baseline: PreTrainedModel | None,
) -> tuple[Quality, float | None, float | None]:
    """Return quality under a router, agreement of the own one with the oracle, and chance.

    The agreement is None for a replaced router; both are None for a model that does not route.
    """
    routed = routing_blocks(model)
    if not routed:
        if router != "own":
            raise RequestError(f"the model does not route, so it cannot have a router {router!r}.")
        return quality(model, windows_WL, baseline), None, None
    agreements = []
    with ExitStack() as stack:
        for index, block in enumerate(routed):
            if router == "own":
                agreements += stack.enter_context(watch_router(block))
            else:
                stack.enter_context(replace_router(block, router, seed + index))
        measured = quality(model, windows_WL, baseline)
    own = fmean(fmean(layer) for layer in agreements) if agreements else None
    return measured, own, 1 / math.comb(*routed[0].gate.choice)


@torch.no_grad()
def quality(
    model: PreTrainedModel,
    windows_WL: torch.Tensor,
    baseline: PreTrainedModel | None = None,
    *,
    description: str = "perplexity",
) -> Quality:
    """Run the model, and its baseline beside it, on the L - 1 predicted tokens of each window.

    Raises `CMoEError` if one of them yields NaN.
    """
    windows, length = windows_WL.shape
    models = [model] if baseline is None else [model, baseline]
    totals, apart, same = [0.0 for _ in models], 0.0, 0
    most = min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // model.config.vocab_size)
    for ids_BL in tqdm(windows_WL.split(max(1, most // length)), desc=description, disable=None):
        ids_BL = ids_BL.to(model.device)
        logits = [it(input_ids=ids_BL, use_cache=False).logits[:, :-1] for it in models]
        for *logits_LV, next_L in zip(*logits, ids_BL[:, 1:], strict=True):
            for index, it_LV in enumerate(logits_LV):
                totals[index] += F.cross_entropy(it_LV.float(), next_L, reduction="sum").item()
            if baseline is not None:
                apart += divergence(*logits_LV).item() * len(next_L)
                ours_L, theirs_L = (it_LV.argmax(dim=1) for it_LV in logits_LV)
                same += int((ours_L == theirs_L).sum())
    tokens = windows * (length - 1)
    ours, *theirs = (checked_perplexity(total / tokens) for total in totals)
    return Quality(ours, theirs[0], apart / tokens, same / tokens) if theirs else Quality(ours)


def divergence(logits_TV: torch.Tensor, target_TV: torch.Tensor) -> torch.Tensor:
    """Return the mean Kullback-Leibler divergence KL(target || model) in nats per token.

    A vocabulary that is padded to another size counts as far as both models have it.
    """
    vocabulary = min(logits_TV.shape[1], target_TV.shape[1])
    log_TV = logits_TV[:, :vocabulary].float().log_softmax(dim=1)
    target_log_TV = target_TV[:, :vocabulary].float().log_softmax(dim=1)
    return F.kl_div(log_TV, target_log_TV, reduction="batchmean", log_target=True)


def checked_perplexity(mean: float) -> float:
    """Return exp of a mean loss. Raises `CMoEError` for what is no number, or too large for one."""
    if not math.isfinite(mean):
        raise CMoEError(
            "the model yields NaN on this text: its weights are damaged or its precision "
            "overflows. Try --dtype float32."
        )
    if mean > HIGHEST_LOSS:
        raise CMoEError(
            f"the model's mean loss on this text is {mean:.3g}: no number is as large as its "
            "perplexity. Its weights are damaged, or it is another model's tokenizer."
        )
    return math.exp(mean)
