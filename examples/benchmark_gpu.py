# SPDX-License-Identifier: Apache-2.0
"""Everything that only a GPU can show, in one call of a few minutes, as one JSON object.

    python examples/benchmark_gpu.py > gpu.json
    python examples/benchmark_gpu.py --shape tiny --layers 1 --quick     # to try it, also on a CPU

The Llama-2-7B shape with random bfloat16 weights: FFN block, prefill of 8,192 tokens, decoding of
1, 8 and 64 sequences, for S1A1E8, S2A2E8 and S3A3E8, with the default experts backend and the
stock ones, then decoding compiled with CUDA graphs. What fails or does not fit into the time is
recorded as such. A table of the same figures goes to standard error.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from cmoe_hf.conversion import benchmark

SIZES = {"tokens": (1, 8, 64, 512, 8192), "prefill": (8192,), "batch": (1, 8, 64)}
QUICK = {"tokens": (1, 8), "prefill": (32,), "batch": (1, 2)}
NOTHING = {"tokens": (), "prefill": (), "batch": ()}
SPLITS = ((1, 1), (2, 2), (3, 3))


def runs(sizes: dict) -> list[tuple[str, dict]]:
    """The most telling ones first: the time may run out."""
    planned = []
    for shared, active in SPLITS:
        split = {"shared": shared, "active": active, "experts": 8}
        planned.append(("eager", {**split, **sizes}))
        decoding = {**split, **NOTHING, "batch": sizes["batch"], "compiled": True}
        planned.append(("compiled", decoding))
    for shared, active in SPLITS[::2]:
        split = {"shared": shared, "active": active, "experts": 8}
        for backend in ("grouped_mm", "batched_mm", "eager"):
            # batched_mm copies the weights of every token: not for many of them.
            few = tuple(size for size in sizes["tokens"] if size <= 64)
            planned.append(
                (
                    f"backend {backend}",
                    {**split, **NOTHING, "tokens": few, "batch": (1,), "backend": backend},
                )
            )
    return planned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device")
    parser.add_argument("--seconds", type=float, default=420, help="start no run after this")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    options = parser.parse_args()

    start, results = time.monotonic(), []
    table = Table("", "", "dense ms", "carved ms", "speed", "runs", "roofline")
    for name, settings in runs(QUICK if options.quick else SIZES):
        if time.monotonic() - start > options.seconds:
            results.append({"run": name, **settings, "skipped": "no time left"})
            continue
        try:
            result = benchmark(
                shape=options.shape,
                layers=options.layers,
                dtype=options.dtype,
                device=options.device,
                rounds=3 if options.quick else 7,
                context=32 if options.quick else 512,
                **settings,
            )
        except Exception as error:  # the other runs are still worth having
            results.append({"run": name, **settings, "failed": f"{type(error).__name__}: {error}"})
            continue
        results.append({"run": name, **asdict(result)})
        for kind in ("ffn", "prefill", "decode"):
            for point in getattr(result, kind):
                table.add_row(
                    f"{result.notation} {name}",
                    f"{kind} {point.tokens} x {point.batch}",
                    f"{point.dense_ms:.3g}",
                    f"{point.carved_ms:.3g}",
                    f"{point.speedup:.2f}",
                    f"{point.speedup_low:.2f}-{point.speedup_high:.2f}",
                    f"{point.roofline_speedup:.2f}",
                )
    Console(file=sys.stderr).print(table)
    print(json.dumps({"seconds": time.monotonic() - start, "runs": results}))


if __name__ == "__main__":
    main()
