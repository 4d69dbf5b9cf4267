# SPDX-License-Identifier: Apache-2.0
"""Whether fresh processes choose the same ways to compute on this CPU, and what choosing costs.

    python examples/repeat_choice.py                       # SmolLM2's shape, S3A3E8, 20 processes
    python examples/repeat_choice.py --shape tinyllama-1.1b --layers 8 --dtype bfloat16

Each process makes a carved model with random weights and runs a prompt and 60 decoding steps twice:
first while it chooses, then with what it has chosen. Printed are the kinds of calls that not all
processes chose alike, the time of a step by process, and how much longer the first run took.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from statistics import median
from typing import Any

import torch

from cmoe_hf.conversion.carve.shape import Shape
from cmoe_hf.conversion.device import DTYPES, device_name
from cmoe_hf.conversion.measure.shapes import SHAPES, random_carved, shape_config
from cmoe_hf.conversion.measure.timing import Decoder
from cmoe_hf.modeling_cmoe import EXPERTS_TUNER, LINEAR_TUNER

PROMPT, STEPS = 128, 60


@torch.no_grad()
def run_once(options: argparse.Namespace) -> dict[str, Any]:
    """Choose, and run again with what was chosen."""
    config = shape_config(options.shape, options.layers, Shape.parse(options.notation))
    model = random_carved(config, torch.device("cpu"), DTYPES[options.dtype])
    prompt = torch.randint(config.vocab_size, (1, PROMPT))
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        decoder = Decoder(model, prompt, None)
        for turn in range(STEPS):
            decoder(turn)
        seconds.append(time.perf_counter() - start)
    steps = []
    for turn in range(STEPS):
        start = time.perf_counter()
        decoder(turn)
        steps.append(time.perf_counter() - start)
    chosen = {**LINEAR_TUNER.chosen, **EXPERTS_TUNER.chosen}
    ways = {" ".join(str(part) for part in kind): way for kind, way in chosen.items()}
    return {"ways": ways, "step": median(steps), "choosing": seconds[0] - seconds[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--notation", default="S3A3E8")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--processes", type=int, default=20, help="0: be one of them")
    options = parser.parse_args()
    if options.processes == 0:
        print(json.dumps(run_once(options)))
        return
    command = [sys.executable, *sys.argv, "--processes", "0"]
    runs = []
    for number in range(options.processes):
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        runs.append(json.loads(output.splitlines()[-1]))
        step, choosing = (1e3 * runs[-1][name] for name in ("step", "choosing"))
        print(f"process {number}: {step:.2f} ms a step, choosing {choosing:.0f} ms", flush=True)
    print(f"{device_name(torch.device('cpu'))}, torch {torch.__version__}")
    for kind in runs[0]["ways"]:
        votes = Counter(run["ways"].get(kind, "undecided") for run in runs)
        if len(votes) > 1:
            print(f"{kind}: {dict(votes)}")
    for name in ("step", "choosing"):
        times = sorted(1e3 * run[name] for run in runs)
        print(f"{name}: {times[0]:.2f} to {times[-1]:.2f} ms, median {median(times):.2f}")


if __name__ == "__main__":
    main()
