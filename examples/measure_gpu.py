# SPDX-License-Identifier: Apache-2.0
"""What a GPU gains, in one call of at most ten minutes: first that it is right, then a table.

    python examples/measure_gpu.py gpu.json
    TRITON_INTERPRET=1 python examples/measure_gpu.py gpu.json --quick    # to try it, on a CPU

Random weights in bfloat16, dense and carved in turn, medians. For S1A1E8, S3A3E8, S2A2E8 and the
fine experts of a budget, with the experts backends "cmoe", "cmoe_gathered" and "cmoe_triton": the
FFN block as it is and in a CUDA graph, where nothing is launched; decoding compiled with CUDA
graphs; prefill. What fails or does not fit into the time is recorded as such.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from cmoe_hf.conversion import benchmark
from cmoe_hf.conversion.carve.shape import Shape
from cmoe_hf.conversion.measure.routing import sparse_blocks
from cmoe_hf.conversion.measure.shapes import dense_twin, random_model, shape_config
from cmoe_hf.conversion.measure.timing import COMPILER

BACKENDS = ("cmoe", "cmoe_gathered", "cmoe_triton")
SPLITS = ((1, 1, 8), (3, 3, 8), (2, 2, 8), (16, 16, 64))
SIZES = {"tokens": (1, 8, 16, 64, 512, 8192), "prefill": (2048, 8192), "batch": (1, 8, 64)}
QUICK = {"tokens": (1,), "prefill": (32,), "batch": ()}
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def models(shape, layers, split, dtype=torch.bfloat16):
    """A carved model of random weights, and a dense one."""
    config = shape_config(shape, layers, Shape(*split))
    carved = random_model(config, DEVICE, dtype).eval().requires_grad_(False)
    return carved, random_model(dense_twin(config), DEVICE, dtype).eval().requires_grad_(False)


def error(got, exact):
    """Of a tensor, relative to its size."""
    return ((got.float() - exact).norm() / exact.norm()).item()


def check(shape, split, dtype, compiled):
    """Raise an exception if a block computes something else than the loop over experts.

    The measure is what that loop computes in float32: the kernels may be half as far off again as
    it is itself in 16 bits.
    """
    carved, _ = models(shape, 1, split, dtype)
    [block] = sparse_blocks(carved)
    exact, _ = models(shape, 1, split, torch.float32)
    exact.load_state_dict(carved.float().state_dict())
    carved.to(dtype)
    exact.set_experts_implementation("eager")
    [exact_block] = sparse_blocks(exact)
    for tokens in (1, 2, 7, 16) if ON_GPU else (3,):
        x_1TH = torch.randn(1, tokens, carved.config.hidden_size, device=DEVICE, dtype=dtype)
        expected = exact_block(x_1TH.float())
        carved.set_experts_implementation("eager")
        allowed = 1.5 * error(block(x_1TH), expected) + 1e-3
        for backend in BACKENDS:
            carved.set_experts_implementation(backend)
            ways = {"as it is": partial(block, x_1TH)}
            if compiled and ON_GPU:
                compiled_block = torch.compile(block, fullgraph=True, options=COMPILER)
                ways["compiled"] = partial(compiled_block, x_1TH)
                ways["in a CUDA graph"] = graph_of(ways["as it is"])
            for name, way in ways.items():
                found = error(way(), expected)
                if not found <= allowed:
                    raise ArithmeticError(
                        f"{backend} {name}, {split} of {dtype}, {tokens} tokens: an error of "
                        f"{found:.2g} where the loop over experts has {allowed / 1.5:.2g}"
                    )


def graph_of(run):
    """A function that repeats captured work, and returns its output."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # tile sizes are tried in the first
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay():
        graph.replay()
        return output

    return replay


def milliseconds(replay, count=50):
    """Of one call, median of seven rounds."""
    taken = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) / count)
    return median(taken)


def without_launches(shape, layers, split, sizes):
    """Rows of the FFN block in a CUDA graph: all layers, so that weights come from memory."""
    carved, dense = models(shape, layers, split)
    hidden = carved.config.hidden_size

    def through(blocks, x_1TH):
        return [block(x_1TH) for block in blocks]

    for tokens in sizes["tokens"]:
        x_1TH = torch.randn(1, tokens, hidden, device=DEVICE, dtype=torch.bfloat16)
        blocks = [layer.mlp for layer in dense.model.layers]
        dense_ms = milliseconds(graph_of(partial(through, blocks, x_1TH))) / layers
        for backend in BACKENDS:
            carved.set_experts_implementation(backend)
            replay = graph_of(partial(through, list(sparse_blocks(carved)), x_1TH))
            ms = milliseconds(replay) / layers
            yield {"what": f"FFN in a graph, {tokens}", "backend": backend} | {
                "dense_ms": dense_ms,
                "carved_ms": ms,
                "speedup": dense_ms / ms,
            }


def with_launches(shape, layers, split, sizes):
    """Rows of the FFN block, prefill and compiled decoding, as `cmoe benchmark` times them."""
    shared, active, experts = split
    for backend in BACKENDS:
        result = benchmark(
            shape=shape,
            layers=layers,
            dtype="bfloat16",
            shared=shared,
            active=active,
            experts=experts,
            backend=backend,
            compiled=ON_GPU,
            context=512 if ON_GPU else 32,
            rounds=7 if ON_GPU else 1,
            **sizes,
        )
        for kind in ("ffn", "prefill", "decode"):
            for point in getattr(result, kind):
                size = point.batch if kind == "decode" else point.tokens
                yield {"what": f"{kind}, {size}"} | asdict(point) | {"backend": backend}


def rows(shape, layers, sizes, seconds):
    """Rows of all splits, the most telling ones first."""
    start = time.monotonic()
    for split in SPLITS:
        for measure in (with_launches, without_launches) if ON_GPU else (with_launches,):
            about = {"shape": shape, "layers": layers, "split": "S{}A{}E{}".format(*split)}
            if time.monotonic() - start > seconds:
                yield about | {"what": "no time left"}
                continue
            try:
                for row in measure(shape, layers, split, sizes):
                    yield about | row
            except Exception as failure:  # the other rows are still worth having
                yield about | {"what": f"{type(failure).__name__}: {failure}"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, default=8, help="of Llama-2-7B's shape; 32 fit")
    parser.add_argument("--quick", action="store_true", help="a small shape")
    options = parser.parse_args()
    shapes = {"tiny": 1} if options.quick else {"llama-2-7b": options.layers, "llama-3.2-1b": 16}
    sizes, results = QUICK if options.quick else SIZES, []
    with torch.no_grad():
        for shape in shapes:
            for split in SPLITS[:1] if options.quick else SPLITS:
                for dtype in (torch.bfloat16, torch.float16):
                    check(shape, split, dtype, compiled=split == SPLITS[0])
        print("blocks compute what the loop over experts does", file=sys.stderr)
        table = Table("", "", "dense ms", "carved ms", "times dense", "roofline")
        for (shape, layers), seconds in zip(shapes.items(), (270, 90), strict=False):
            for row in rows(shape, layers, sizes, seconds):
                results.append(row)
                names = ("dense_ms", "carved_ms", "speedup", "roofline_speedup")
                figures = [f"{row[name]:.3g}" if name in row else "" for name in names]
                about = f"{shape} {row['split']} {row.get('backend', '')}"
                table.add_row(about, row["what"], *figures)
                options.output.write_text(json.dumps(results, indent=1), encoding="utf-8")
    Console(file=sys.stderr, width=120).print(table)


if __name__ == "__main__":
    main()
