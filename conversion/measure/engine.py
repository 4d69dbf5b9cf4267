# SPDX-License-Identifier: Apache-2.0
"""Dense beside carved in llama.cpp: two servers, asked in turn, which time themselves."""

import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass
from functools import partial
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
    prefill: list[Comparison]
    """The roofline is the ratio of what must be multiplied."""
    decode: list[Comparison]
    """Of what must be read."""
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
    width = number("embedding_length") // max(1, number("attention.head_count"))
    keys = number("attention.head_count_kv") * number("attention.key_length", width)
    cached = 2 * 2 * keys * number("block_count")
    tokens: Any = reader.get_field("tokenizer.ggml.tokens")
    vocabulary = number("vocab_size", 0 if tokens is None else len(tokens.data))
    return GGUFWork(name, vocabulary, read, products, cached)


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
    check_at_least(1, threads=asked.threads, rounds=asked.rounds)
    check_at_least(1, prefill=asked.prefill, context=asked.context)
    dense, carved = gguf_work(asked.baseline), gguf_work(asked.model)
    longest = max([*asked.prefill, *(tokens + STEPS for tokens in asked.context)], default=1)
    options: Any = {"threads": asked.threads, "options": ("-c", str(longest + 8))}
    points: dict[str, list[Comparison]] = {"prefill": [], "decode": []}
    with ExitStack() as stack:
        servers = [
            stack.enter_context(LlamaServer(file, **options))
            for file in (asked.baseline, asked.model)
        ]
        kinds = [("prefill", it) for it in asked.prefill] + [("decode", it) for it in asked.context]
        for kind, tokens in tqdm(kinds, desc="timing", unit="point", disable=None):
            if kind == "prefill":
                roofline = dense.products / carved.products
            else:
                reads = [work.bytes + tokens * work.cached for work in (dense, carved)]
                roofline = reads[0] / reads[1]
            timers = [partial(server_seconds, it, kind, tokens, dense) for it in servers]
            for warm_up in timers:
                warm_up(-1)
            times: Any = compare(timers, asked.rounds, roofline)
            points[kind].append(Comparison(tokens=tokens, **times))
    return EngineBenchmark(
        model=Path(asked.model).name,
        baseline=Path(asked.baseline).name,
        architectures=[dense.architecture, carved.architecture],
        engine=f"llama.cpp {server_version()}",
        device=device_name(torch.device("cpu")),
        threads=asked.threads,
        dense_bytes=round(dense.bytes),
        carved_bytes=round(carved.bytes),
        versions=versions(),
        **points,
    )


def server_seconds(server: LlamaServer, kind: str, tokens: int, work: GGUFWork, turn: int) -> float:
    """Return what a server says of its time for a prompt, or for a token behind it."""
    draw = random.Random(turn)
    ids = [draw.randrange(10, work.vocabulary) for _ in range(tokens)]
    timings = server.complete(ids, 1 if kind == "prefill" else STEPS)["timings"]
    return timings["prompt_ms" if kind == "prefill" else "predicted_per_token_ms"] / 1000
