# SPDX-License-Identifier: Apache-2.0
"""The verb `benchmark`: is the carved model faster, where, and how far from what is possible."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..carve.settings import ShapeOptions, absolute, public_name
from ..carve.shape import Shape
from ..device import DTYPES, check_dtype, device_name, find_device, name_of, versions
from ..errors import RequestError
from ..options import LoadOptions, with_options
from ..source.calibration import WHOLE_CHARACTERS, read_tokens
from ..source.checkpoint import find_model
from ..source.loading import load_config, load_model, window_length
from ..source.texts import open_text
from .routing import check_flat, sparse_blocks
from .shapes import check_memory, dense_twin, random_model, shape_config
from .timing import DECODE_STEPS, LABELS, Bench, Point


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
    """Decode with a static cache and `torch.compile(mode="reduce-overhead")`."""


@with_options(BenchmarkOptions)
def benchmark(options: BenchmarkOptions) -> Benchmark:
    """Time FFN, prefill and decoding of a carved model against the dense one.

    Raises:
        RequestError: The request cannot be satisfied.
        CMoEError: A model or text cannot be reached.
    """
    model, baseline, shape, layers = options.model, options.baseline, options.shape, options.layers
    shared, active, experts = options.shared, options.active, options.experts
    tokens, prefill, batch = options.tokens, options.prefill, options.batch
    context, rounds, text, backend = options.context, options.rounds, options.text, options.backend
    compiled, dtype, device = options.compiled, options.dtype, options.device
    trust_remote_code = options.trust_remote_code
    given = {"prefill": prefill or [], "layers": [layers], "context": [context]}
    check_positive(tokens=tokens, batch=batch, rounds=[rounds], **given)
    if not (tokens or prefill is None or prefill or batch):
        raise RequestError("nothing to time: give tokens, prefill or batch.")
    check_dtype(dtype)
    where = find_device(device)
    check_choice(model, shape, layers, baseline, text)
    if shape is None:
        config = load_config(str(model), trust_remote_code)
    else:
        config = shape_config(shape, layers, Shape(shared, active, experts))
    fitting = partial(window_length, config)
    prompts = [None] if prefill is None else prefill
    prefill = [fitting(length, option="--prefill", usual=512) for length in prompts]
    new_tokens = DECODE_STEPS * (rounds + 1) if batch else 0
    context = fitting(context, option="--context", usual=128, new_tokens=new_tokens)
    if shape is None:
        pair = (str(model), baseline, text)
        carved, dense, ids = loaded_pair(*pair, dtype, where, trust_remote_code)
    else:
        carved, dense, ids = random_pair(config, where, dtype)
    choose_backend(carved, backend)
    bench = Bench(dense, carved, ids, rounds=rounds)
    points = bench.run(tokens, prefill, batch, context, compiled)
    return Benchmark(
        model=shape if shape is not None else public_name(absolute(str(model))),
        notation=carved.config.notation,
        activation_ratio=carved.config.activation_ratio,
        layers=carved.config.num_hidden_layers,
        device=device_name(where),
        threads=torch.get_num_threads(),
        dtype=name_of(carved.dtype),
        backend=str(carved.config._experts_implementation),
        compiled=compiled,
        context=context,
        bandwidth_gb_per_s=bench.rates.bytes / 1e9,
        arithmetic_gflop_per_s=bench.rates.operations / 1e9,
        remarks=remarks(points),
        versions=versions(),
        **points,
    )


def remarks(points: dict[str, list[Point]]) -> list[str]:
    """In words: where the carved model is slower, and where its lead is not its own merit."""
    said = []
    for name, measured in points.items():
        for point in measured:
            size = f"{point.batch} sequences" if name == "decode" else f"{point.tokens} tokens"
            where = f"{LABELS[name]} of {size.replace('1 sequences', '1 sequence')}"
            where = where.replace(" 1 tokens", " 1 token")
            if point.speedup < 1:
                certain = "" if point.speedup_high < 1 else ", within the spread of the runs"
                said.append(
                    f"SLOWER: {where}: the carved model takes {1 / point.speedup:.2f} times as "
                    f"long as the dense one{certain}; the roofline allows "
                    f"{point.roofline_speedup:.2f} times its speed."
                )
            elif point.speedup > 1.2 * point.roofline_speedup:
                said.append(
                    f"{where}: more than the roofline's ratio, because the dense model is "
                    f"{point.dense_ms / point.dense_roofline_ms:.1f} times slower than its own "
                    "bound here."
                )
    return said or ["The carved model is faster at every measured point."]


Pair = tuple[PreTrainedModel, PreTrainedModel, torch.Tensor | None]
"""The carved model, the dense one, and the tokens of a text to run on."""


def loaded_pair(
    model: str,
    baseline: str | Path | None,
    text: str | Path | None,
    dtype: str | None,
    device: torch.device,
    trust_remote_code: bool,
) -> Pair:
    """The models as they are stored. Raises `RequestError`."""
    check_flat(find_model(model)[0])
    opened = None if text is None else open_text(text, part="test")
    carved, tokenizer = load_model(model, dtype, device, trust_remote_code)
    if not sparse_blocks(carved):
        raise RequestError(f"{model} is not a carved model: there is nothing to compare.")
    dense = dense_beside(carved, baseline, trust_remote_code)
    if opened is None:
        return carved, dense, None
    vocabulary = min(carved.config.vocab_size, dense.config.vocab_size)
    read = read_tokens(opened, tokenizer, vocabulary, most_characters=WHOLE_CHARACTERS)
    return carved, dense, read.ids


def random_pair(config: PreTrainedConfig, device: torch.device, dtype: str | None) -> Pair:
    """A shape, carved and dense, with random weights. Raises `RequestError` without the memory."""
    weights = DTYPES[dtype or "float32"]
    check_memory(config, device, weights)
    carved = random_model(config, device, weights)
    return carved, dense_beside(carved, None, False), None


def dense_beside(
    carved: PreTrainedModel, baseline: str | Path | None, trust_remote_code: bool
) -> PreTrainedModel:
    """The dense model to compare with, in the same precision and place. Raises `RequestError`."""
    if baseline is None:
        return random_model(dense_twin(carved.config), carved.device, carved.dtype)
    dense, _ = load_model(baseline, name_of(carved.dtype), carved.device, trust_remote_code)
    check_same_shape(dense, carved, baseline)
    return dense


def choose_backend(model: PreTrainedModel, backend: str | None) -> None:
    """Switch the experts backend, if asked to. Raises `RequestError` if there is none such."""
    try:
        if backend is not None:
            model.set_experts_implementation(backend)
    except ValueError as error:
        raise RequestError(f"there is no experts backend {backend!r}: {error}") from error


def check_choice(
    model: object, shape: str | None, layers: int | None, baseline: object, text: object
) -> None:
    """Raises `RequestError` unless there is a model or a shape, with what goes with it."""
    if (model is None) == (shape is None):
        raise RequestError("give either a carved MODEL or --shape.")
    if shape is None and layers is not None:
        raise RequestError("--layers goes with --shape only.")
    if shape is not None and (baseline is not None or text is not None):
        raise RequestError("--shape has random weights: leave out --baseline and --text.")


def check_positive(**sizes: Sequence[int | None]) -> None:
    """Raises `RequestError` for a size that is not positive."""
    for name, values in sizes.items():
        wrong = [value for value in values if value is not None and value < 1]
        if wrong:
            raise RequestError(f"{name} has {wrong[0]}; it must be at least 1.")


def check_same_shape(dense: PreTrainedModel, carved: PreTrainedModel, baseline: str | Path) -> None:
    """Raises `RequestError` if the models are not dense and carved form of one shape."""
    if sparse_blocks(dense):
        raise RequestError(f"the baseline {baseline} is carved itself: give the dense model.")
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"):
        theirs, ours = getattr(dense.config, name, None), getattr(carved.config, name)
        if theirs != ours:
            raise RequestError(
                f"{baseline} has {name} {theirs}, but the carved model has {ours}: it is not the "
                "model that was carved."
            )
