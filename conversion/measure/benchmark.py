# SPDX-License-Identifier: Apache-2.0
"""The verb `benchmark`: is the carved model faster, where, and how far from what is possible.

Dense and carved run in turn, in one process, on the same inputs. Shape suffixes: B sequences,
L tokens of each, T tokens, H hidden size, K active experts.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, StaticCache

from cmoe_hf.modeling_cmoe import cache_name

from ..carve.settings import Settings, absolute, public_name
from ..device import DTYPES, check_dtype, device_name, find_device, name_of, synchronize, versions
from ..errors import RequestError
from ..source.calibration import WHOLE_CHARACTERS, read_tokens
from ..source.checkpoint import find_model
from ..source.loading import load_model
from ..source.texts import open_text
from .roofline import Work, ffn_work, measure_rates, model_work
from .routing import check_flat, collected, sparse_blocks
from .shapes import check_memory, dense_config, random_model, shape_config


@dataclass(frozen=True, kw_only=True)
class Point:
    """Dense against carved at one size."""

    tokens: int
    """New tokens of each sequence; of the FFN, all of them."""
    batch: int
    """Sequences."""
    dense_ms: float
    """Median over the rounds."""
    carved_ms: float
    speedup: float
    """Median of the rounds' ratios, dense over carved: above 1 the carved model is faster."""
    speedup_low: float
    speedup_high: float
    roofline_speedup: float
    """Ratio of the least times that the machine could take."""
    dense_roofline_ms: float
    carved_roofline_ms: float
    experts_hit: float
    """Different experts that the tokens need in one layer, on average."""


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


def benchmark(
    model: str | Path | None = None,
    *,
    baseline: str | Path | None = None,
    shape: str | None = None,
    layers: int | None = None,
    shared: int = 3,
    active: int = 3,
    experts: int = 8,
    tokens: Sequence[int] = (1, 8, 64, 512),
    prefill: Sequence[int] = (512,),
    batch: Sequence[int] = (1, 8),
    context: int = 128,
    rounds: int = 7,
    text: str | Path | None = None,
    backend: str | None = None,
    compiled: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Benchmark:
    """Time FFN, prefill and decoding of a carved model against the dense one.

    Args:
        model: Folder or Hub id of a carved model.
        baseline: Folder or Hub id of the dense model. Without it, one of the same shape with
            random weights: its speed does not depend on them.
        shape: One of `SHAPES`, instead of `model`: both with random weights.
        layers: Layers of that shape; default all of them.
        shared, active, experts: How that shape is carved.
        tokens: Numbers of tokens for the FFN block.
        prefill: Lengths of a prompt.
        batch: Numbers of sequences to decode.
        context: Tokens in front of a decoding step.
        rounds: Dense and carved runs of each point, in turn.
        text: Text to run on, see `evaluate`; default random tokens. What a token is decides
            which experts it needs.
        backend: Experts backend, default the model's own choice.
        compiled: Decode with a static cache and `torch.compile(mode="reduce-overhead")`.
        dtype: Precision, default that of the carved model; float32 for a shape.
        device: Where to compute, default the accelerator if there is one.
        trust_remote_code: Run Python code that comes with a model.

    Raises:
        RequestError: The request cannot be satisfied.
        CMoEError: A model or text cannot be reached.
    """
    check_sizes(tokens=tokens, prefill=prefill, batch=batch, context=[context], rounds=[rounds])
    check_sizes(layers=[] if layers is None else [layers])
    if not (tokens or prefill or batch):
        raise RequestError("nothing to time: give tokens, prefill or batch.")
    check_dtype(dtype)
    where = find_device(device)
    if (model is None) == (shape is None):
        raise RequestError("give either a carved MODEL or --shape.")
    tokenizer = opened = None
    if shape is not None:
        if baseline is not None or text is not None:
            raise RequestError("--shape has random weights: leave out --baseline and --text.")
        settings = Settings(shared=shared, active=active, experts=experts)
        config, weights = shape_config(shape, layers, settings), DTYPES[dtype or "float32"]
        check_memory(config, where, weights)
        carved = random_model(config, where, weights)
    else:
        assert model is not None
        if layers is not None:
            raise RequestError("--layers goes with --shape only.")
        check_flat(find_model(model)[0])
        opened = None if text is None else open_text(text, part="test")
        carved, tokenizer = load_model(model, dtype, where, trust_remote_code)
        if not sparse_blocks(carved):
            raise RequestError(f"{model} is not a carved model: there is nothing to compare.")
    dense = dense_beside(carved, baseline, trust_remote_code)
    if backend is not None:
        choose_backend(carved, backend)
    ids = None
    if opened is not None and tokenizer is not None:
        vocabulary = min(carved.config.vocab_size, dense.config.vocab_size)
        read = read_tokens(opened, tokenizer, vocabulary, most_characters=WHOLE_CHARACTERS)
        ids = read.ids
    bench = Bench(dense, carved, ids, rounds=rounds)
    with torch.no_grad():
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


class Bench:
    """Two models side by side, and the rates of the machine they run on."""

    def __init__(
        self,
        dense: PreTrainedModel,
        carved: PreTrainedModel,
        ids: torch.Tensor | None,
        *,
        rounds: int,
    ) -> None:
        self.dense, self.carved, self.ids, self.rounds = dense.eval(), carved.eval(), ids, rounds
        decoder: Any = dense.base_model
        self.dense_blocks: list[nn.Module] = [layer.mlp for layer in decoder.layers]
        self.carved_blocks: list[nn.Module] = list(sparse_blocks(carved))
        self.device = carved.device
        self.rates = measure_rates(self.device, carved.dtype)

    def run(
        self,
        tokens: Sequence[int],
        prefill: Sequence[int],
        batch: Sequence[int],
        context: int,
        compiled: bool,
    ) -> dict[str, list[Point]]:
        """All points by the names of `LABELS`, with a progress bar."""
        kinds = {
            "ffn": self.ffn(tokens),
            "prefill": self.prefill(prefill),
            "decode": self.decode(batch, context, compiled),
        }
        points: dict[str, list[Point]] = {name: [] for name in kinds}
        total = len(tokens) + len(prefill) + len(batch)
        with tqdm(total=total, desc="timing", unit="point", disable=None) as bar:
            for name, measured in kinds.items():
                for point in measured:
                    points[name].append(point)
                    bar.update()
        return points

    def ffn(self, sizes: Sequence[int]) -> Iterator[Point]:
        """The FFN block alone, from layer to layer, on what it sees in the carved model."""
        inputs = self.ffn_inputs(2 * max(sizes, default=1))
        layers = len(inputs)

        def run(blocks: list[nn.Module], tokens: int, turn: int) -> None:
            x_TH = inputs[turn % layers]
            start = turn // layers * tokens % (len(x_TH) - tokens + 1)
            blocks[turn % layers](x_TH[None, start : start + tokens])

        for tokens in sizes:
            run_dense = partial(run, self.dense_blocks, tokens)
            run_carved = partial(run, self.carved_blocks, tokens)
            hit = self.experts_hit(run_carved, range(4 * layers))
            works = (
                ffn_work(self.dense_blocks[0], tokens, 0),
                ffn_work(self.carved_blocks[0], tokens, statistics.mean(hit)),
            )
            seconds = interleaved(run_dense, run_carved, self.rounds, self.device)
            yield self.point(seconds, works, hit, tokens=tokens, batch=1)

    def prefill(self, lengths: Sequence[int]) -> Iterator[Point]:
        """The whole model over one new sequence."""

        def run(model: PreTrainedModel, prompts: list[torch.Tensor], turn: int) -> None:
            model(prompts[turn % len(prompts)], use_cache=True, logits_to_keep=1)

        for length in lengths:
            prompts = [self.sequences(1, length, seed=seed) for seed in range(4)]
            run_dense, run_carved = (
                partial(run, model, prompts) for model in (self.dense, self.carved)
            )
            hit = self.experts_hit(run_carved, range(1))
            seconds = interleaved(run_dense, run_carved, self.rounds, self.device)
            works = self.works(hit, batch=1, tokens=length, context=0)
            yield self.point(seconds, works, hit, tokens=length, batch=1)

    def decode(self, batches: Sequence[int], context: int, compiled: bool) -> Iterator[Point]:
        """The whole model, one new token a sequence behind `context` of them."""
        for batch in batches:
            prompt_BL = self.sequences(batch, context)
            room = context + DECODE_STEPS * (self.rounds + 1) if compiled else None
            dense, carved = (Decoder(model, prompt_BL, room) for model in (self.dense, self.carved))
            hit = self.experts_hit(Decoder(self.carved, prompt_BL, None), range(DECODE_STEPS))
            seconds = interleaved(dense, carved, self.rounds, self.device, repeats=DECODE_STEPS)
            works = self.works(hit, batch=batch, tokens=1, context=context)
            yield self.point(seconds, works, hit, tokens=1, batch=batch)

    def sequences(self, batch: int, length: int, *, seed: int = 0) -> torch.Tensor:
        """Token ids (B, L): pieces of the text, or random ones."""
        chance = torch.Generator().manual_seed(seed)
        if self.ids is None:
            vocabulary = self.carved.config.vocab_size
            return torch.randint(vocabulary, (batch, length), generator=chance).to(self.device)
        if len(self.ids) < length:
            raise RequestError(f"the text has {len(self.ids)} tokens, but {length} are needed.")
        starts = torch.randint(len(self.ids) - length + 1, (batch,), generator=chance).tolist()
        return torch.stack([self.ids[i : i + length] for i in starts]).to(self.device)

    def ffn_inputs(self, tokens: int) -> list[torch.Tensor]:
        """What the FFN of each layer sees, at least `tokens` rows (T, H)."""
        length = min(tokens, 512, self.carved.config.max_position_embeddings)
        with torch.no_grad(), collected(self.carved_blocks, lambda *call: call[1][0]) as seen:
            for seed in range(-(-tokens // length)):
                self.carved.model(self.sequences(1, length, seed=seed), use_cache=False)
        return [torch.cat(inputs, dim=1).flatten(0, 1) for inputs in seen]

    def experts_hit(self, call: Callable[[int], None], turns: Sequence[int]) -> list[float]:
        """How many different experts each layer runs in one of these calls."""
        gates = [block.gate for block in sparse_blocks(self.carved)]
        with collected(gates, lambda *call: call[2][2].unique().numel()) as counts:
            for turn in turns:
                call(turn)
        # A block without active experts never calls its router.
        return [statistics.mean(seen) if seen else 0.0 for seen in counts]

    def works(self, hit: list[float], **sizes: int) -> tuple[Work, Work]:
        """What the two models cannot do without."""
        return (
            model_work(self.dense, self.dense_blocks, hit, **sizes),
            model_work(self.carved, self.carved_blocks, hit, **sizes),
        )

    def point(
        self,
        seconds: list[tuple[float, float]],
        works: tuple[Work, Work],
        hit: list[float],
        *,
        tokens: int,
        batch: int,
    ) -> Point:
        """The medians of the rounds beside the lower bounds."""
        ratios = [dense / carved for dense, carved in seconds]
        dense_bound, carved_bound = (self.rates.seconds(work) for work in works)
        return Point(
            tokens=tokens,
            batch=batch,
            dense_ms=1e3 * statistics.median(dense for dense, _ in seconds),
            carved_ms=1e3 * statistics.median(carved for _, carved in seconds),
            speedup=statistics.median(ratios),
            speedup_low=min(ratios),
            speedup_high=max(ratios),
            roofline_speedup=dense_bound / carved_bound,
            dense_roofline_ms=1e3 * dense_bound,
            carved_roofline_ms=1e3 * carved_bound,
            experts_hit=statistics.mean(hit),
        )


class Decoder:
    """Greedy decoding behind a prompt (B, L); each call is one step."""

    def __init__(self, model: PreTrainedModel, prompt_BL: torch.Tensor, room: int | None) -> None:
        """With `room` for that many tokens: a static cache and a compiled step."""
        self.forward = model.forward
        self.cache_name = cache_name(model.forward)
        config = model.config
        self.cache = (
            DynamicCache(config=config)
            if room is None
            else StaticCache(config=config, max_cache_len=room)
        )
        self.position = torch.arange(prompt_BL.shape[1], device=prompt_BL.device)[None]
        self.ids_BL = prompt_BL
        self(0)
        self.position = self.position[:, -1:].clone(memory_format=torch.contiguous_format)
        if room is not None:
            self.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)

    def __call__(self, turn: int) -> None:
        """One step; it does not matter which."""
        torch.compiler.cudagraph_mark_step_begin()
        output = self.forward(
            input_ids=self.ids_BL,
            position_ids=self.position,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: self.cache},
        )
        self.ids_BL = output.logits[:, -1:].argmax(dim=-1)
        self.position = self.position + 1


DECODE_STEPS = 4
"""Decoding steps of a round."""


def interleaved(
    dense: Callable[[int], None],
    carved: Callable[[int], None],
    rounds: int,
    device: torch.device,
    *,
    repeats: int | None = None,
) -> list[tuple[float, float]]:
    """Seconds of a call of each, in turn, in every round; the calls are told their number.

    A round repeats the calls until they take about 50 ms, or `repeats` times. Which goes first
    changes from round to round.
    """

    def timed(call: Callable[[int], None], first: int, count: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for turn in range(first, first + count):
            call(turn)
        synchronize(device)
        return (time.perf_counter() - start) / count

    timed(dense, 0, repeats or 1)  # a graph is compiled and captured in the first calls
    timed(carved, 0, repeats or 1)
    count = repeats or max(1, min(200, round(0.05 / timed(carved, 1, 1))))
    seconds = []
    for index in range(rounds):
        first = index * count
        if index % 2:
            seconds.append((timed(dense, first, count), timed(carved, first, count)))
        else:
            carved_seconds = timed(carved, first, count)
            seconds.append((timed(dense, first, count), carved_seconds))
    return seconds


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


LABELS = {"ffn": "FFN block", "prefill": "prefill", "decode": "decoding"}


def dense_beside(
    carved: PreTrainedModel, baseline: str | Path | None, trust_remote_code: bool
) -> PreTrainedModel:
    """The dense model to compare with, in the same precision and place. Raises `RequestError`."""
    if baseline is None:
        return random_model(dense_config(carved.config), carved.device, carved.dtype)
    dense, _ = load_model(baseline, name_of(carved.dtype), carved.device, trust_remote_code)
    check_same_shape(dense, carved, baseline)
    return dense


def choose_backend(model: PreTrainedModel, backend: str) -> None:
    """Switch the experts backend. Raises `RequestError` if there is none of that name."""
    try:
        model.set_experts_implementation(backend)
    except ValueError as error:
        raise RequestError(f"there is no experts backend {backend!r}: {error}") from error


def check_sizes(**sizes: Sequence[int]) -> None:
    """Raises `RequestError` for a size that is not positive."""
    for name, values in sizes.items():
        wrong = [value for value in values if value < 1]
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
