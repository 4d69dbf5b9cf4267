# SPDX-License-Identifier: Apache-2.0
"""Times dense and carved in turn, in one process, on the same inputs, beside the least possible.

Shape suffixes: B sequences, L tokens of each, T tokens, H hidden size, K active experts.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, StaticCache

from cmoe_hf.modeling_cmoe import cache_keyword

from ..device import synchronize
from ..errors import RequestError
from .roofline import Work, ffn_work, measure_rates, model_work
from .routing import collected, sparse_blocks

LABELS = {"ffn": "FFN block", "prefill": "prefill", "decode": "decoding"}
DECODE_STEPS = 4
"""Decoding steps of a round."""
Call = Callable[[int], None]
"""What is timed; it gets its number, so that dense and carved see the same inputs."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Dense against carved, timed in turn."""

    dense_ms: float
    """Median over the rounds."""
    carved_ms: float
    speedup: float
    """Median of the rounds' ratios, dense over carved: above 1 the carved model is faster."""
    speedup_low: float
    speedup_high: float
    roofline_speedup: float
    """Ratio of the least times that the machine could take."""


@dataclass(frozen=True, kw_only=True)
class Point(Comparison):
    """Dense against carved at one size."""

    tokens: int
    """New tokens of each sequence; of the FFN, all of them."""
    batch: int
    """Sequences."""
    dense_roofline_ms: float
    carved_roofline_ms: float
    experts_hit: float
    """Different experts that the tokens need in one layer, on average."""


def compare(seconds: Sequence[tuple[float, float]], roofline: float) -> dict[str, float]:
    """Return the fields of `Comparison`, from the times of dense and carved in every round."""
    ratios = [dense / carved for dense, carved in seconds]
    return {
        "dense_ms": 1e3 * statistics.median(dense for dense, _ in seconds),
        "carved_ms": 1e3 * statistics.median(carved for _, carved in seconds),
        "speedup": statistics.median(ratios),
        "speedup_low": min(ratios),
        "speedup_high": max(ratios),
        "roofline_speedup": roofline,
    }


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
        kept = carved.config.dense_layers or ()
        self.dense_blocks: list[nn.Module] = [
            layer.mlp for index, layer in enumerate(decoder.layers) if index not in kept
        ]
        self.carved_blocks: list[nn.Module] = list(sparse_blocks(carved))
        self.device = carved.device
        self.rates = measure_rates(self.device, carved.dtype)

    @torch.no_grad()
    def run(
        self,
        tokens: Sequence[int],
        prefill: Sequence[int],
        batch: Sequence[int],
        context: int,
        compiled: bool,
    ) -> dict[str, list[Point]]:
        """Return all points by the names of `LABELS`, with a progress bar."""
        kinds = {
            "ffn": self.ffn(tokens),
            "prefill": self.prefill(prefill),
            "decode": self.decode(batch, context, compiled),
        }
        total = len(tokens) + len(prefill) + len(batch)
        points: dict[str, list[Point]] = {name: [] for name in kinds}
        with tqdm(total=total, desc="timing", unit="point", disable=None) as bar:
            for name, measured in kinds.items():
                for point in measured:
                    points[name].append(point)
                    bar.update()
        return points

    def ffn(self, sizes: Sequence[int]) -> Iterator[Point]:
        """Time the FFN block alone, layer by layer, on what it sees in the carved model."""
        inputs = self.ffn_inputs(2 * max(sizes, default=1))
        layers = len(inputs)

        def run(blocks: list[nn.Module], tokens: int, turn: int) -> None:
            x_TH = inputs[turn % layers]
            start = turn // layers * tokens % (len(x_TH) - tokens + 1)
            blocks[turn % layers](x_TH[None, start : start + tokens])

        for tokens in sizes:
            both = (self.dense_blocks, self.carved_blocks)
            calls = [partial(run, blocks, tokens) for blocks in both]
            hit = self.experts_hit(calls[1], range(4 * layers))
            works = (
                ffn_work(self.dense_blocks[0], tokens, 0),
                ffn_work(self.carved_blocks[0], tokens, statistics.mean(hit)),
            )
            yield self.point(calls, works, hit, tokens=tokens, batch=1)

    def prefill(self, lengths: Sequence[int]) -> Iterator[Point]:
        """Time the whole model over one new sequence."""

        def run(model: PreTrainedModel, prompts: list[torch.Tensor], turn: int) -> None:
            model(prompts[turn % len(prompts)], use_cache=True, logits_to_keep=1)

        for length in lengths:
            prompts = [self.sequences(1, length, seed=seed) for seed in range(4)]
            calls = [partial(run, model, prompts) for model in (self.dense, self.carved)]
            hit = self.experts_hit(calls[1], range(1))
            works = self.works(hit, batch=1, tokens=length, context=0)
            yield self.point(calls, works, hit, tokens=length, batch=1)

    def decode(self, batches: Sequence[int], context: int, compiled: bool) -> Iterator[Point]:
        """Time the whole model, one new token a sequence behind `context` of them."""
        for batch in batches:
            prompt_BL = self.sequences(batch, context)
            most = context + DECODE_STEPS * (self.rounds + 1) if compiled else None
            calls = [Decoder(model, prompt_BL, most) for model in (self.dense, self.carved)]
            hit = self.experts_hit(Decoder(self.carved, prompt_BL, None), range(DECODE_STEPS))
            works = self.works(hit, batch=batch, tokens=1, context=context)
            yield self.point(calls, works, hit, repeats=DECODE_STEPS, tokens=1, batch=batch)

    def sequences(self, batch: int, length: int, *, seed: int = 0) -> torch.Tensor:
        """Return token ids (B, L): pieces of the text, or random ones."""
        chance = torch.Generator().manual_seed(seed)
        if self.ids is None:
            vocabulary = self.carved.config.vocab_size
            return torch.randint(vocabulary, (batch, length), generator=chance).to(self.device)
        if len(self.ids) < length:
            raise RequestError(f"the text has {len(self.ids)} tokens, but {length} are needed.")
        starts = torch.randint(len(self.ids) - length + 1, (batch,), generator=chance).tolist()
        return torch.stack([self.ids[i : i + length] for i in starts]).to(self.device)

    def ffn_inputs(self, tokens: int) -> list[torch.Tensor]:
        """Return what the FFN of each layer sees, at least `tokens` rows (T, H)."""
        length = min(tokens, 512, self.carved.config.max_position_embeddings)
        with collected(self.carved_blocks, lambda *call: call[1][0]) as seen:
            for seed in range(-(-tokens // length)):
                self.carved.model(self.sequences(1, length, seed=seed), use_cache=False)
        return [torch.cat(inputs, dim=1).flatten(0, 1) for inputs in seen]

    def experts_hit(self, call: Call, turns: Sequence[int]) -> list[float]:
        """Return how many different experts each layer runs in one of these calls."""
        gates = [block.gate for block in sparse_blocks(self.carved)]
        with collected(gates, lambda *call: call[2][2].unique().numel()) as counts:
            for turn in turns:
                call(turn)
        # A block without active experts never calls its router.
        return [statistics.mean(seen) if seen else 0.0 for seen in counts]

    def works(self, hit: list[float], **sizes: int) -> tuple[Work, Work]:
        """Return what the two models cannot do without."""
        return (
            model_work(self.dense, self.dense_blocks, hit, **sizes),
            model_work(self.carved, self.carved_blocks, hit, **sizes),
        )

    def point(
        self,
        calls: Sequence[Call],
        works: tuple[Work, Work],
        hit: list[float],
        *,
        repeats: int | None = None,
        **sizes: int,
    ) -> Point:
        """Time two calls; return the medians of the rounds beside the lower bounds."""
        seconds = interleaved(calls, self.rounds, self.device, repeats=repeats)
        dense_bound, carved_bound = (self.rates.seconds(work) for work in works)
        measured: dict[str, Any] = {**compare(seconds, dense_bound / carved_bound), **sizes}
        return Point(
            dense_roofline_ms=1e3 * dense_bound,
            carved_roofline_ms=1e3 * carved_bound,
            experts_hit=statistics.mean(hit),
            **measured,
        )


class Decoder:
    """Greedy decoding behind a prompt (B, L); each call is one step."""

    def __init__(self, model: PreTrainedModel, prompt_BL: torch.Tensor, most: int | None) -> None:
        """Read the prompt. With `most` tokens in all: a static cache and a compiled step."""
        self.forward = model.forward
        self.cache_keyword = cache_keyword(model.forward)
        config = model.config
        self.cache = (
            DynamicCache(config=config)
            if most is None
            else StaticCache(config=config, max_cache_len=most)
        )
        self.position = torch.arange(prompt_BL.shape[1], device=prompt_BL.device)[None]
        self.ids_BL = prompt_BL
        self(0)
        self.position = self.position[:, -1:].clone(memory_format=torch.contiguous_format)
        if most is not None:
            self.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)

    def __call__(self, turn: int) -> None:
        """Decode one token; it does not matter which `turn` it is."""
        torch.compiler.cudagraph_mark_step_begin()
        output = self.forward(
            input_ids=self.ids_BL,
            position_ids=self.position,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_keyword: self.cache},
        )
        self.ids_BL = output.logits[:, -1:].argmax(dim=-1)
        self.position = self.position + 1


def interleaved(
    calls: Sequence[Call],
    rounds: int,
    device: torch.device,
    *,
    repeats: int | None = None,
) -> list[tuple[float, float]]:
    """Return the seconds of a call, dense and carved in turn, in every round.

    A round repeats the calls until they take about 50 ms, or `repeats` times. Which goes first
    changes from round to round. As in `timeit`, nothing is collected meanwhile.
    """

    def timed(call: Call, first: int, count: int) -> float:
        collects = gc.isenabled()
        gc.disable()
        try:
            synchronize(device)
            start = time.perf_counter()
            for turn in range(first, first + count):
                call(turn)
            synchronize(device)
            return (time.perf_counter() - start) / count
        finally:
            if collects:
                gc.enable()

    for call in calls:
        timed(call, 0, repeats or 1)  # a graph is compiled and captured in the first calls
    count = repeats or max(1, min(200, round(0.05 / timed(calls[1], 1, 1))))
    seconds = []
    for index in range(rounds):
        order = (0, 1) if index % 2 else (1, 0)
        taken = {which: timed(calls[which], index * count, count) for which in order}
        seconds.append((taken[0], taken[1]))
    return seconds
