# SPDX-License-Identifier: Apache-2.0
"""Dense beside carved in llama.cpp: two servers, asked in turn, which time themselves."""

import random
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..device import device_name, versions
from ..errors import RequestError, missing
from ..options import with_options
from .llama_cpp import LlamaServer, server_version

STEPS = 32
"""Tokens that are decoded in a round."""


@dataclass(frozen=True, kw_only=True)
class EnginePoint:
    """Dense against carved at one size."""

    tokens: int
    """Of the prompt, or in front of those that are decoded."""
    dense_ms: float
    """Median over the rounds: of the prompt, or of one decoded token."""
    carved_ms: float
    speedup: float
    """Median of the rounds' ratios, dense over carved: above 1 the carved model is faster."""
    speedup_low: float
    speedup_high: float
    roofline_speedup: float
    """Ratio of what must be read (decoding), or multiplied (a prompt)."""


@dataclass(frozen=True, kw_only=True)
class EngineBenchmark:
    """What was measured; the keys of `cmoe benchmark --engine llama.cpp --json`."""

    model: str
    baseline: str
    architectures: list[str]
    """Of both, as llama.cpp calls them."""
    engine: str
    device: str
    threads: int
    dense_bytes: int
    """Read for one token of the dense model, without keys and values."""
    carved_bytes: int
    prefill: list[EnginePoint]
    decode: list[EnginePoint]
    versions: dict[str, str]


@dataclass(frozen=True)
class GGUFWork:
    """What a token costs in a GGUF file's model."""

    architecture: str
    vocabulary: int
    bytes: float
    """Read for one token."""
    products: float
    """Multiplications for one token of a prompt, without the head and attention's own."""
    cached: float
    """Bytes of keys and values of one token, in float16."""


def gguf_work(file: str | Path) -> GGUFWork:
    """Read a file's header. Raises `RequestError` if it is no GGUF file."""
    try:
        from gguf import GGUFReader

        reader = GGUFReader(file)
    except ImportError:
        raise missing("GGUF files need one more package", "gguf") from None
    except (OSError, ValueError) as error:
        raise RequestError(f"{file} cannot be read as a GGUF file: {error}.") from error

    def field(name: str, default: Any = None) -> Any:
        found = reader.get_field(name)
        value = default if found is None else found.contents()
        return value[0] if isinstance(value, list) else value

    name = str(field("general.architecture"))
    share = field(f"{name}.expert_used_count", 0) / max(1, field(f"{name}.expert_count", 1))
    names = {tensor.name for tensor in reader.tensors}
    read = products = 0.0
    for tensor in reader.tensors:
        part = share if "_exps." in tensor.name else 1.0
        if tensor.name == "token_embd.weight":
            part = 0.0 if "output.weight" in names else 1.0  # tied, it is the head too
        read += part * int(tensor.n_bytes)
        if tensor.name not in ("token_embd.weight", "output.weight"):
            products += part * int(tensor.n_elements)
    width = field(f"{name}.attention.key_length", 0)
    keys = field(f"{name}.attention.head_count_kv", 0) * width
    cached = 2 * 2 * keys * field(f"{name}.block_count", 0)
    return GGUFWork(name, field(f"{name}.vocab_size"), read, products, cached)


@dataclass(frozen=True)
class GGUFBenchmarkOptions:
    """The options of `benchmark_gguf`."""

    model: str | Path
    """GGUF file of the carved model."""
    baseline: str | Path
    """GGUF file of the dense one, of the same type."""
    _: KW_ONLY
    threads: int = 1
    """Threads of llama.cpp, for prompts and for decoding."""
    prefill: Sequence[int] = (512,)
    """Tokens of a prompt."""
    context: Sequence[int] = (128,)
    """Tokens in front of those that are decoded."""
    rounds: int = 7
    """Runs of each point, dense and carved in turn."""


@with_options(GGUFBenchmarkOptions)
def benchmark_gguf(asked: GGUFBenchmarkOptions) -> EngineBenchmark:
    """Time a carved model against the dense one in llama.cpp, on random tokens.

    Raises:
        RequestError: There is no such file, or no llama.cpp.
        CMoEError: llama.cpp cannot run a file.
    """
    model, baseline, threads = asked.model, asked.baseline, asked.threads
    prefill, context, rounds = asked.prefill, asked.context, asked.rounds
    if min([threads, rounds, *prefill, *context], default=0) < 1:
        raise RequestError("threads, rounds and numbers of tokens must be at least 1.")
    dense, carved = gguf_work(baseline), gguf_work(model)
    longest = max([*prefill, *(tokens + STEPS for tokens in context)], default=1)
    options = ("-c", str(longest + 8))
    points: dict[str, list[EnginePoint]] = {"prefill": [], "decode": []}
    with ExitStack() as stack:
        servers = [
            stack.enter_context(LlamaServer(file, threads=threads, options=options))
            for file in (baseline, model)
        ]
        kinds = [("prefill", it) for it in prefill] + [("decode", it) for it in context]
        for kind, tokens in tqdm(kinds, desc="timing", unit="point", disable=None):
            draw = random.Random(0)
            times: list[list[float]] = []
            for turn in range(rounds + 1):
                ids = [draw.randrange(10, dense.vocabulary) for _ in range(tokens)]
                pair = servers if turn % 2 else servers[::-1]
                measured = {id(server): timed(server, ids, kind) for server in pair}
                times.append([measured[id(server)] for server in servers])
            if kind == "decode":
                roofline = (dense.bytes + tokens * dense.cached) / (
                    carved.bytes + tokens * carved.cached
                )
            else:
                roofline = dense.products / carved.products
            points[kind].append(point(tokens, times[1:], roofline))  # the first warms up
    return EngineBenchmark(
        model=Path(model).name,
        baseline=Path(baseline).name,
        architectures=[dense.architecture, carved.architecture],
        engine=f"llama.cpp {server_version()}",
        device=device_name(torch.device("cpu")),
        threads=threads,
        dense_bytes=round(dense.bytes),
        carved_bytes=round(carved.bytes),
        versions=versions(),
        **points,
    )


def timed(server: LlamaServer, ids: list[int], kind: str) -> float:
    """Milliseconds of a prompt, or of one token behind it, as the server says."""
    count = 1 if kind == "prefill" else STEPS
    answer = server.post(
        "/completion",
        **{"prompt": ids, "n_predict": count, "ignore_eos": True, "cache_prompt": False},
        **{"temperature": 0, "samplers": ["top_k"], "top_k": 1},
    )
    key = "prompt_ms" if kind == "prefill" else "predicted_per_token_ms"
    return float(answer["timings"][key])


def point(tokens: int, times: list[list[float]], roofline: float) -> EnginePoint:
    """The statistics of a point, from the times of both in every round."""
    ratios = [dense / carved for dense, carved in times]
    return EnginePoint(
        tokens=tokens,
        dense_ms=statistics.median(dense for dense, _ in times),
        carved_ms=statistics.median(carved for _, carved in times),
        speedup=statistics.median(ratios),
        speedup_low=min(ratios),
        speedup_high=max(ratios),
        roofline_speedup=roofline,
    )
