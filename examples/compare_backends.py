# SPDX-License-Identifier: Apache-2.0
"""Time the default experts backend against its own ways and the stock ones, in turn.

    python examples/compare_backends.py                  # shapes of small and large models
    python examples/compare_backends.py --size 4096,1376,7,1 --tokens 1,64,512 --dtype bfloat16
    python examples/compare_backends.py --device cuda --dtype bfloat16

A size is hidden size, neurons of an expert, routed experts, active experts. The weights and the
routing are random; only the routed experts run, the same ones again and again, so that small ones
stay in a cache. Printed: medians in milliseconds and, last, the time of the default relative to the
best other one, and which it is.
"""

import argparse
import statistics
import time
from functools import partial

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from cmoe_hf import CMoELlamaConfig
from cmoe_hf.modeling_cmoe import (
    CMoEExperts,
    ExpertsLoop,
    all_experts,
    cmoe_experts_forward,
    fastest_backend,
)

SIZES = [
    (4096, 1376, 7, 1),  # Llama-2-7B S1A1E8
    (4096, 1376, 5, 3),  # S3A3E8
    (4096, 688, 14, 2),  # S2A2E16
    (2048, 704, 7, 1),  # TinyLlama S1A1E8
    (1024, 352, 7, 1),
    (576, 192, 7, 1),  # SmolLM2-135M S1A1E8
    (576, 32, 37, 12),  # and half of it in 48
    (256, 128, 7, 1),
    (256, 128, 5, 3),
    (128, 48, 7, 1),  # the embedded default
    (128, 48, 5, 3),
]


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


WAYS = {
    "eager": ExpertsLoop.forward,
    "grouped_mm": ALL_EXPERTS_FUNCTIONS["grouped_mm"],
    "batched_mm": ALL_EXPERTS_FUNCTIONS["batched_mm"],
    "all_experts": all_experts,
    "cmoe": cmoe_experts_forward,
}


@torch.no_grad()
def compare(size: tuple[int, ...], tokens: int, options: argparse.Namespace) -> str:
    hidden, neurons, experts, active = size
    dtype = getattr(torch, options.dtype)
    config = CMoELlamaConfig(
        hidden_size=hidden,
        intermediate_size=neurons * (experts + 1),
        shared_expert_intermediate_size=neurons,
        moe_intermediate_size=neurons,
        num_experts=experts,
        num_experts_per_tok=active,
    )
    module = CMoEExperts(config).to(options.device, dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x_TH = torch.randn(tokens, hidden, dtype=dtype, device=options.device)
    index_TK = torch.rand(tokens, experts, device=options.device).topk(active).indices
    weight_TK = torch.ones(tokens, active, dtype=dtype, device=options.device)
    calls = {name: partial(way, module, x_TH, index_TK, weight_TK) for name, way in WAYS.items()}
    if tokens * active * 3 * hidden * neurons >= options.copied:
        del calls["batched_mm"]  # it copies that much
    times: dict[str, list[float]] = {name: [] for name in calls}
    names, repeats = list(calls), 1
    wait = torch.cuda.synchronize if x_TH.is_cuda else lambda: None
    for turn in range(options.rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wait()
            start = time.perf_counter()
            for _ in range(repeats):
                calls[name]()
            wait()
            times[name].append((time.perf_counter() - start) / repeats)
        if turn == 0:
            for call in calls.values():  # once more: the first calls load their kernels
                call()
            repeats = max(1, min(50, round(0.01 / times["cmoe"][0])))
    medians = {name: 1e3 * statistics.median(seconds[1:]) for name, seconds in times.items()}
    best = min(value for name, value in medians.items() if name != "cmoe")
    columns = [f"{medians[name]:10.3f}" if name in medians else f"{'':10}" for name in WAYS]
    chosen = fastest_backend(module, tokens, active)
    return f"{size!s:22}{tokens:6} {''.join(columns)}{medians['cmoe'] / best:8.2f}  {chosen}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=numbers, action="append")
    parser.add_argument("--tokens", type=numbers, default=(1, 8, 64, 512))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    options.copied = 10**7 if options.device == "cpu" else 10**9
    titles = "".join(f"{name:>10}" for name in WAYS)
    print(f"{'size':22}tokens {titles}   ratio  chosen")
    for size in options.size or SIZES:
        for tokens in options.tokens:
            print(compare(size, tokens, options), flush=True)


if __name__ == "__main__":
    main()
