# SPDX-License-Identifier: Apache-2.0
"""Time the default experts backend against the stock ones, in turn, for several sizes.

    python examples/compare_backends.py                  # shapes of small and large models
    python examples/compare_backends.py --size 4096,1376,7,1 --tokens 1,64,512 --dtype bfloat16

A size is hidden size, neurons of an expert, routed experts, active experts. The weights and the
routing are random; only the routed experts run. Printed: medians in milliseconds and, last, the
time of the default relative to the best stock backend.
"""

import argparse
import statistics
import time

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from cmoe_hf import CMoELlamaConfig
from cmoe_hf.modeling_cmoe import CMoEExperts, fastest_backend

SIZES = [
    (4096, 1376, 7, 1),  # Llama-2-7B S1A1E8
    (4096, 1376, 5, 3),  # S3A3E8
    (4096, 688, 14, 2),  # S2A2E16
    (1024, 352, 7, 1),
    (256, 128, 7, 1),
    (256, 128, 5, 3),
    (128, 48, 7, 1),  # the embedded default
    (128, 48, 5, 3),
]


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


@torch.no_grad()
def compare(size: tuple[int, ...], tokens: int, dtype: torch.dtype, rounds: int) -> str:
    hidden, neurons, experts, active = size
    config = CMoELlamaConfig(
        hidden_size=hidden,
        intermediate_size=neurons * (experts + 1),
        shared_expert_intermediate_size=neurons,
        moe_intermediate_size=neurons,
        num_experts=experts,
        num_experts_per_tok=active,
    )
    module = CMoEExperts(config).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x_TH = torch.randn(tokens, hidden, dtype=dtype)
    index_TK = torch.rand(tokens, experts).topk(active).indices
    weight_TK = torch.ones(tokens, active, dtype=dtype)
    backends = ["eager", "grouped_mm", "cmoe"]
    if tokens * active * 3 * hidden * neurons < 10**7:  # it copies that much
        backends.append("batched_mm")
    assert set(backends) - {"eager"} <= set(ALL_EXPERTS_FUNCTIONS)
    times: dict[str, list[float]] = {name: [] for name in backends}
    repeats = 1
    for turn in range(rounds + 1):
        for name in backends[turn % len(backends) :] + backends[: turn % len(backends)]:
            config._experts_implementation = name
            start = time.perf_counter()
            for _ in range(repeats):
                module(x_TH, index_TK, weight_TK)
            times[name].append((time.perf_counter() - start) / repeats)
        if turn == 0:
            repeats = max(1, min(50, round(0.01 / times["cmoe"][0])))
    medians = {name: 1e3 * statistics.median(seconds[1:]) for name, seconds in times.items()}
    best = min(value for name, value in medians.items() if name != "cmoe")
    columns = [f"{medians[name]:10.3f}" if name in medians else f"{'':10}" for name in TITLES]
    chosen = fastest_backend(module, tokens, active)
    return f"{size!s:22}{tokens:6} {''.join(columns)}{medians['cmoe'] / best:8.2f}  {chosen}"


TITLES = ["eager", "grouped_mm", "batched_mm", "cmoe"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=numbers, action="append")
    parser.add_argument("--tokens", type=numbers, default=(1, 8, 64, 512))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    titles = "".join(f"{name:>10}" for name in TITLES)
    print(f"{'size':22}tokens {titles}   ratio  chosen")
    for size in options.size or SIZES:
        for tokens in options.tokens:
            dtype = getattr(torch, options.dtype)
            print(compare(size, tokens, dtype, options.rounds), flush=True)


if __name__ == "__main__":
    main()
