# SPDX-License-Identifier: Apache-2.0
"""Dense beside carved in llama.cpp: two servers, asked in turn, which time themselves."""

import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..device import device_name, versions
from ..errors import RequestError, check_at_least, missing
from ..options import with_options
from .llama_cpp import LlamaServer, server_version
from .timing import Comparison, compare

STEPS = 32
"""Tokens that are decoded in a round."""


@dataclass(frozen=True, kw_only=True)
class EnginePoint(Comparison):
    """Dense against carved at one size. The roofline is the ratio of what must be read (decoding),
    or multiplied (a prompt)."""

    tokens: int
    """Of the prompt, or in front of those that are decoded."""


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
    """Read a file's header. Raise `RequestError` if it is no GGUF file."""
    try:
        from gguf import GGUFReader

        reader = GGUFReader(file)
    except ImportError:
        raise missing("GGUF files need one more package", "gguf") from None
    except (OSError, ValueError) as error:
        raise RequestError(f"{file} cannot be read as a GGUF file: {error}.") from error

    def number(key: str, default: int = 0) -> int:
        field: Any = reader.get_field(f"{name}.{key}")
        value = default if field is None else field.contents()
        return value[0] if isinstance(value, list) else value

    architecture: Any = reader.get_field("general.architecture")
    if architecture is None:
        raise RequestError(f"{file} names no architecture: it holds no model.")
    name = str(architecture.contents())
    share = number("expert_used_count") / max(1, number("expert_count"))
    untied = any(tensor.name == "output.weight" for tensor in reader.tensors)
    read = products = 0.0
    for tensor in reader.tensors:
        part = share if "_exps." in tensor.name else 1.0
        if tensor.name != "token_embd.weight" or not untied:  # tied, it is the head too
            read += part * int(tensor.n_bytes)
        if tensor.name not in ("token_embd.weight", "output.weight"):
            products += part * int(tensor.n_elements)
    keys = number("attention.head_count_kv") * number("attention.key_length")
    cached = 2 * 2 * keys * number("block_count")
    return GGUFWork(name, number("vocab_size"), read, products, cached)


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
    check_at_least(1, threads=threads, rounds=rounds, prefill=prefill, context=context)
    dense, carved = gguf_work(baseline), gguf_work(model)
    longest = max([*prefill, *(tokens + STEPS for tokens in context)], default=1)
    points: dict[str, list[EnginePoint]] = {"prefill": [], "decode": []}
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                LlamaServer(file, threads=threads, options=("-c", str(longest + 8)))
            )
            for file in (baseline, model)
        ]
        kinds = [("prefill", it) for it in prefill] + [("decode", it) for it in context]
        for kind, tokens in tqdm(kinds, desc="timing", unit="point", disable=None):
            if kind == "prefill":
                roofline = dense.products / carved.products
            else:
                reads = [work.bytes + tokens * work.cached for work in (dense, carved)]
                roofline = reads[0] / reads[1]
            times = in_turn(servers, kind, tokens, rounds, dense.vocabulary)
            points[kind].append(EnginePoint(tokens=tokens, **compare(times, roofline)))
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


def in_turn(
    servers: Sequence[LlamaServer], kind: str, tokens: int, rounds: int, vocabulary: int
) -> list[tuple[float, float]]:
    """Return the seconds of both servers for a prompt, or for a token behind it, in every round.

    They are the servers' own. Which is asked first changes from round to round.
    """
    draw, times = random.Random(0), []
    for turn in range(rounds + 1):
        ids = [draw.randrange(10, vocabulary) for _ in range(tokens)]
        seconds = [0.0, 0.0]
        for index in (0, 1) if turn % 2 else (1, 0):
            timings = servers[index].complete(ids, 1 if kind == "prefill" else STEPS)["timings"]
            key = "prompt_ms" if kind == "prefill" else "predicted_per_token_ms"
            seconds[index] = float(timings[key]) / 1000
        times.append((seconds[0], seconds[1]))
    return times[1:]  # the first warms up
