# SPDX-License-Identifier: Apache-2.0
"""Times dense and carved in turn, in one process, on the same inputs, beside the least possible.

Shape suffixes: B sequences, L tokens of each, T tokens, H hidden size, K active experts.
"""

import inspect
import timeit
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, StaticCache

from cmoe_hf.modeling_cmoe import Tuner, current_backend

from ..device import synchronize
from ..errors import RequestError
from .roofline import Work, ffn_work, measure_rates, model_work
from .routing import collected, sparse_blocks

LABELS = {"ffn": "FFN block", "prefill": "prefill", "decode": "decoding"}
DECODE_STEPS = 4
"""Decoding steps of a round."""
COMPILER: dict[str, Any] = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
"""Mode "reduce-overhead", and kernels that gather an expert's weights and multiply at once."""
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
    tokens: int
    """New tokens of each sequence; of the FFN, all of them. In llama.cpp: of the prompt, or in
    front of those that are decoded."""


@dataclass(frozen=True, kw_only=True)
class Point(Comparison):
    """Dense against carved at one size."""

    batch: int
    """Sequences."""
    dense_roofline_ms: float
    carved_roofline_ms: float
    experts_hit: float
    """Different experts that the tokens need in one layer, on average."""
    backend: str
    """How the experts ran."""


def compare(
    timers: Sequence[Callable[[int], float]], rounds: int, roofline: float
) -> dict[str, float]:
    """Return the times of `Comparison`, from what two timers say in every round, in seconds.

    Each round has its number, and the order of dense and carved alternates.
    """
    seconds = []
    for turn in range(rounds):
        taken = {which: timers[which](turn) for which in ((0, 1) if turn % 2 else (1, 0))}
        seconds.append((taken[0], taken[1]))
    ratios = [dense / carved for dense, carved in seconds]
    return {
        "dense_ms": 1e3 * median(dense for dense, _ in seconds),
        "carved_ms": 1e3 * median(carved for _, carved in seconds),
        "speedup": median(ratios),
        "speedup_low": min(ratios),
        "speedup_high": max(ratios),
        "roofline_speedup": roofline,
    }


def settle(call: Call) -> None:
    """Repeat a call until it has tried all ways to compute it, 100 times at most."""
    for turn in range(100):
        trials = Tuner.trials
        call(turn)
        if trials == Tuner.trials:
            return


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
        self.carved, self.ids, self.rounds = carved, ids, rounds
        self.models = (dense.eval(), carved.eval())
        ffn, kept = carved.config.ffn, carved.config.dense_layers or ()
        layers: Any = dense.base_model.get_submodule(ffn["layers"])
        dense_blocks: list[nn.Module] = [
            nn.Sequential(*(layer.get_submodule(name) for name in (ffn["module"], *ffn["skipped"])))
            if ffn["skipped"]
            else layer.get_submodule(ffn["module"])
            for index, layer in enumerate(layers)
            if index not in kept
        ]
        self.blocks = (dense_blocks, list[nn.Module](sparse_blocks(carved)))
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
        points = {
            "ffn": self.ffn(tokens),
            "prefill": map(self.prefill, prefill),
            "decode": (self.decode(size, context, compiled) for size in batch),
        }
        total, found = len(tokens) + len(prefill) + len(batch), dict[str, list[Point]]()
        with tqdm(total=total, desc="timing", unit="point", disable=None) as bar:
            for name, measured in points.items():
                found[name] = []
                for point in measured:
                    found[name].append(point)
                    bar.update()
        return found

    def ffn(self, sizes: Sequence[int]) -> Iterator[Point]:
        """Time the FFN block alone, layer by layer, on what it sees in the carved model."""
        if not sizes:
            return
        inputs = self.ffn_inputs(2 * max(sizes))
        layers = len(inputs)

        def run(blocks: list[nn.Module], tokens: int, turn: int) -> None:
            x_TH = inputs[turn % layers]
            start = turn // layers * tokens % (len(x_TH) - tokens + 1)
            x_1TH = x_TH[None, start : start + tokens]
            residual = (x_1TH,) if self.carved.config.ffn["takes_residual"] else ()
            blocks[turn % layers](x_1TH, *residual)

        for tokens in sizes:
            calls = [partial(run, it, tokens) for it in self.blocks]
            hit = self.experts_hit(calls[1], 4 * layers)
            works = [ffn_work(it[0], tokens, fmean(hit)) for it in self.blocks]
            yield self.point(calls, works, hit, tokens=tokens, batch=1)

    def prefill(self, length: int) -> Point:
        """Time the whole model over one new sequence.

        Every prompt is another one: libraries remember the shapes that they have met, and a prompt
        repeated sends the same number of tokens to each expert.
        """
        prompts = [self.sequences(1, length, seed=seed) for seed in range(64)]

        def run(model: PreTrainedModel, turn: int) -> None:
            model(prompts[turn % len(prompts)], use_cache=True, logits_to_keep=1)

        calls = [partial(run, model) for model in self.models]
        hit = self.experts_hit(calls[1], 1)
        works = self.works(hit, batch=1, tokens=length, context=0)
        return self.point(calls, works, hit, tokens=length, batch=1)

    def decode(self, batch: int, context: int, compiled: bool) -> Point:
        """Time the whole model, one new token a sequence behind `context` of them."""
        prompt_BL = self.sequences(batch, context)
        most = context + DECODE_STEPS * (self.rounds + 1) if compiled else None
        settle(lambda _: Decoder(self.carved, prompt_BL, None)(0))
        calls = [Decoder(model, prompt_BL, most) for model in self.models]
        hit = self.experts_hit(Decoder(self.carved, prompt_BL, None), DECODE_STEPS)
        works = self.works(hit, batch=batch, tokens=1, context=context)
        return self.point(calls, works, hit, repeats=DECODE_STEPS, tokens=1, batch=batch)

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
        length = min(tokens, 512, getattr(self.carved.config, "max_position_embeddings", 512))
        with collected(self.blocks[1], lambda *call: call[1][0]) as seen:
            for seed in range(-(-tokens // length)):
                self.carved.base_model(self.sequences(1, length, seed=seed), use_cache=False)
        return [torch.cat(inputs, dim=1).flatten(0, 1) for inputs in seen]

    def experts_hit(self, call: Call, turns: int) -> list[float]:
        """Return how many different experts each layer runs in a call, on average."""
        gates = [block.gate for block in sparse_blocks(self.carved)]
        with collected(gates, lambda *call: call[2][2].unique().numel()) as counts:
            for turn in range(turns):
                call(turn)
        # A block without active experts never calls its router.
        return [fmean(seen) if seen else 0.0 for seen in counts]

    def works(self, hit: list[float], **sizes: int) -> list[Work]:
        """Return what the two models cannot do without."""
        pairs = zip(self.models, self.blocks, strict=True)
        return [model_work(model, blocks, hit, **sizes) for model, blocks in pairs]

    def backend(self, tokens: int) -> str:
        """Name the experts backend, or the way that the default one has chosen."""
        backend = str(self.carved.config._experts_implementation)
        block: Any = self.blocks[1][0]
        if backend != "cmoe" or block.gate.top_k == 0:
            return backend
        return current_backend(block.experts, tokens, block.gate.top_k)

    def point(
        self,
        calls: Sequence[Call],
        works: Sequence[Work],
        hit: list[float],
        *,
        repeats: int | None = None,
        **sizes: int,
    ) -> Point:
        """Time two calls, beside their lower bounds.

        A round repeats them until they take about 50 ms, or `repeats` times.
        """

        def seconds(call: Call, count: int, turn: int) -> float:
            def run() -> None:
                for index in range(turn * count, (turn + 1) * count):
                    call(index)
                synchronize(self.device)

            synchronize(self.device)
            return timeit.timeit(run, number=1) / count

        for call in calls:
            seconds(call, repeats or 1, 0)  # a graph is compiled and captured in the first calls
            if repeats is None:
                settle(call)
        count = repeats or max(1, min(200, round(0.05 / seconds(calls[1], 1, 1))))
        dense, carved = (self.rates.seconds(work) for work in works)
        timers = [partial(seconds, call, count) for call in calls]
        measured: dict[str, Any] = {**compare(timers, self.rounds, dense / carved), **sizes}
        tokens = sizes["tokens"] * sizes["batch"]
        return Point(
            backend=self.backend(tokens),
            dense_roofline_ms=1e3 * dense,
            carved_roofline_ms=1e3 * carved,
            experts_hit=fmean(hit),
            **measured,
        )


class Decoder:
    """Greedy decoding behind a prompt (B, L); each call is one step."""

    def __init__(self, model: PreTrainedModel, prompt_BL: torch.Tensor, most: int | None) -> None:
        """Read the prompt. With `most` tokens in all: a static cache and a compiled step."""
        self.forward = model.forward
        known = inspect.signature(model.forward).parameters
        self.cache_keyword = "cache" if "cache" in known else "past_key_values"
        if most is None:
            self.cache: Any = DynamicCache(config=model.config)
        else:
            self.cache = StaticCache(config=model.config, max_cache_len=most)
        self.position = torch.arange(prompt_BL.shape[1], device=prompt_BL.device)[None]
        self.ids_BL = prompt_BL
        self(0)
        self.position = self.position[:, -1:].clone(memory_format=torch.contiguous_format)
        if most is not None:
            self.forward = torch.compile(model.forward, fullgraph=True, options=COMPILER)

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
