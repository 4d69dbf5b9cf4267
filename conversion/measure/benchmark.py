# SPDX-License-Identifier: Apache-2.0
"""Whether a carved model is faster than the dense one, where, and how far from what is possible."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..carve.settings import ShapeOptions, absolute
from ..carve.shape import Shape
from ..device import DTYPES, device_name, find_device, name_of, versions
from ..errors import RequestError, check_at_least, check_known
from ..options import LoadOptions, with_options
from ..source.calibration import WHOLE_CHARACTERS, read_tokens
from ..source.hub import find_model, public_name
from ..source.loading import load_config, load_model, window_length
from ..source.texts import open_text
from .routing import check_dense, check_flat, sparse_blocks
from .shapes import dense_twin, random_carved, random_model, shape_config
from .timing import DECODE_STEPS, LABELS, Bench, Point

WHAT_TO_DO = (
    "What may help: compiled decoding (--compile), llama.cpp (`cmoe export --gguf`), fewer experts "
    "that run, or fewer and larger ones (`cmoe convert --experts 8`)."
)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What was measured; the keys of `cmoe benchmark --json`."""

    model: str
    notation: str
    activation_ratio: float
    layers: int
    device: str
    threads: int
    dtype: str
    backend: str
    """Of the experts."""
    compiled: bool
    """Whether decoding ran compiled, with a static cache."""
    context: int
    """Tokens in front of a decoding step."""
    bandwidth_gb_per_s: float
    arithmetic_gflop_per_s: float
    ffn: list[Point]
    """One FFN block."""
    prefill: list[Point]
    """The whole model over new sequences."""
    decode: list[Point]
    """The whole model, one token a sequence."""
    remarks: list[str]
    """Where the carved model is slower, in words."""
    versions: dict[str, str]


@dataclass(frozen=True)
class BenchmarkOptions(ShapeOptions, LoadOptions):
    """The options of `benchmark`."""

    model: str | Path | None = None
    """Folder or Hub id of a carved model."""
    _: KW_ONLY
    baseline: str | Path | None = None
    """The dense model; default one of the same shape with random weights: its speed does not depend
    on them."""
    shape: str | None = None
    """Random weights instead of a model: tiny, smollm2-135m, smollm2-360m, tinyllama-1.1b,
    llama-3.2-1b, llama-3.2-3b, llama-2-7b, llama-3-8b, llama-2-70b."""
    layers: int | None = None
    """Layers of that shape; default all."""
    tokens: Sequence[int] = (1, 8, 64, 512)
    """Tokens for the FFN block."""
    prefill: Sequence[int] | None = None
    """Tokens of a prompt; default 512 or the context of the model."""
    batch: Sequence[int] = (1, 8)
    """Sequences to decode."""
    context: int | None = None
    """Tokens in front of a decoding step; default 128 or what fits the context of the model."""
    rounds: int = 7
    """Runs of each point, dense and carved in turn."""
    text: str | Path | None = None
    """Text to run on, as in `evaluate`, for tokens decide which experts run; default random
    tokens."""
    backend: str | None = None
    """Experts backend, for example eager, grouped_mm; default the model's choice."""
    compiled: bool = False
    """Decode with a static cache and `torch.compile`, on a GPU with CUDA graphs."""


@with_options(BenchmarkOptions)
def benchmark(options: BenchmarkOptions) -> Benchmark:
    """Time FFN, prefill and decoding of a carved model against the dense one.

    Raises:
        RequestError: The request cannot be satisfied.
        CMoEError: A model or text cannot be reached.
    """
    check_request(options)
    where = find_device(options.device)
    if options.shape is None:
        config = load_config(str(options.model), options.trust_remote_code)
    else:
        asked = Shape(options.shared, options.active, options.experts)
        config = shape_config(options.shape, options.layers, asked)
    fitting = partial(window_length, config)
    prompts = [None] if options.prefill is None else options.prefill
    prefill = [fitting(length, option="--prefill", usual=512) for length in prompts]
    new_tokens = DECODE_STEPS * (options.rounds + 1) if options.batch else 0
    context = fitting(options.context, option="--context", usual=128, new_tokens=new_tokens)
    if options.shape is None:
        carved, ids = load_with_text(options, where)
    else:
        carved, ids = random_carved(config, where, DTYPES[options.dtype or "float32"]), None
    dense = dense_beside(carved, options.baseline, options.trust_remote_code)
    try:
        if options.backend is not None:
            carved.set_experts_implementation(options.backend)
    except ValueError as error:
        raise RequestError(f"there is no experts backend {options.backend!r}: {error}") from error
    bench = Bench(dense, carved, ids, rounds=options.rounds)
    points = bench.run(options.tokens, prefill, options.batch, context, options.compiled)
    return Benchmark(
        model=options.shape or public_name(absolute(str(options.model))),
        notation=carved.config.notation,
        activation_ratio=carved.config.activation_ratio,
        layers=carved.config.num_hidden_layers,
        device=device_name(where),
        threads=torch.get_num_threads(),
        dtype=name_of(carved.dtype),
        backend=str(carved.config._experts_implementation),
        compiled=options.compiled,
        context=context,
        bandwidth_gb_per_s=bench.rates.bytes / 1e9,
        arithmetic_gflop_per_s=bench.rates.operations / 1e9,
        remarks=remarks(points),
        versions=versions(),
        **points,
    )


def remarks(points: dict[str, list[Point]]) -> list[str]:
    """Return where the carved model is slower, and where its lead is not its own merit."""
    found, slower = [], False
    for name, measured in points.items():
        for point in measured:
            count, unit = (point.batch, "sequence") if name == "decode" else (point.tokens, "token")
            where = f"{LABELS[name]} of {count} {unit}{'' if count == 1 else 's'}"
            if point.speedup < 1:
                certain = "" if point.speedup_high < 1 else ", within the spread of the runs"
                found.append(
                    f"SLOWER: {where}: the carved model takes {1 / point.speedup:.2f} times as "
                    f"long as the dense one{certain}; the roofline allows "
                    f"{point.roofline_speedup:.2f} times its speed."
                )
                slower = True
            elif point.speedup > 1.2 * point.roofline_speedup:
                found.append(
                    f"{where}: more than the roofline's ratio, because the dense model is "
                    f"{point.dense_ms / point.dense_roofline_ms:.1f} times slower than its own "
                    "bound here."
                )
    if slower:
        found.append(WHAT_TO_DO)
    return found or ["The carved model is faster at every measured point."]


def check_request(options: BenchmarkOptions) -> None:
    """Raise `RequestError` for options that cannot be, or do not go together."""
    sizes = {name: getattr(options, name) for name in ("tokens", "prefill", "batch", "context")}
    check_at_least(1, **sizes, rounds=options.rounds, layers=options.layers)
    if options.prefill is not None and not (options.tokens or options.prefill or options.batch):
        raise RequestError("nothing to time: give tokens, prefill or batch.")
    check_known("dtype", options.dtype, DTYPES)
    if (options.model is None) == (options.shape is None):
        raise RequestError("give either a carved MODEL or --shape.")
    if options.shape is None and options.layers is not None:
        raise RequestError("--layers goes with --shape only.")
    if options.shape is not None and (options.baseline is not None or options.text is not None):
        raise RequestError("--shape has random weights: leave out --baseline and --text.")


def load_with_text(
    options: BenchmarkOptions, device: torch.device
) -> tuple[PreTrainedModel, torch.Tensor | None]:
    """Load a carved model and the token ids of a text, if there is one. Raise `RequestError`."""
    model = str(options.model)
    check_flat(find_model(model)[0])
    text = None if options.text is None else open_text(options.text, part="test")
    carved, tokenizer = load_model(model, options.dtype, device, options.trust_remote_code)
    if not sparse_blocks(carved):
        raise RequestError(f"{model} is not a carved model: there is nothing to compare.")
    if text is None:
        return carved, None
    vocabulary = carved.config.vocab_size
    return carved, read_tokens(text, tokenizer, vocabulary, most_characters=WHOLE_CHARACTERS).ids


def dense_beside(
    carved: PreTrainedModel, baseline: str | Path | None, trust_remote_code: bool
) -> PreTrainedModel:
    """Return the dense model to compare with, in the same precision and on the same device.

    Raises `RequestError` if it is carved itself, or of another shape.
    """
    if baseline is None:
        return random_model(dense_twin(carved.config), carved.device, carved.dtype)
    dense, _ = load_model(baseline, name_of(carved.dtype), carved.device, trust_remote_code)
    check_dense(dense, baseline)
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"):
        theirs, ours = (getattr(it.config, name, None) for it in (dense, carved))
        if theirs != ours:
            raise RequestError(
                f"{baseline} has {name} {theirs}, but the carved model has {ours}: it is not the "
                "model that was carved."
            )
    return dense
