# SPDX-License-Identifier: Apache-2.0
"""Compare the time of a conversion's carving pass with a real forward pass of the dense model.

    python examples/check_carving_cost.py MODEL CALIBRATION_TEXT [--samples 64]

`conversion.json` derives the bare forward pass from its own steps; this script measures it a second
way, with the transformers model on windows of the same size, interleaved with the conversions.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from cmoe_hf.conversion import convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--recipe", default="paper")
    parser.add_argument("--shape", type=int, nargs=3, default=[1, 1, 8], metavar=("S", "A", "E"))
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).model.eval()
    windows_WL = torch.randint(
        model.config.vocab_size, (arguments.samples, arguments.sequence_length)
    )
    batches = windows_WL.split(max(1, 2048 // arguments.sequence_length))
    rows = []
    for _ in range(arguments.runs):
        start = time.perf_counter()
        with torch.no_grad():
            for ids_BL in batches:
                model(ids_BL, use_cache=False)
        forward = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            convert(
                arguments.model,
                Path(folder) / "out",
                **dict(zip(("shared", "active", "experts"), arguments.shape, strict=True)),
                recipe=arguments.recipe,
                calibration=arguments.calibration,
                samples=arguments.samples,
                sequence_length=arguments.sequence_length,
            )
            layers = json.loads((Path(folder) / "out" / "conversion.json").read_text())["layers"]
        seconds = [layer["seconds"] for layer in layers]
        carving = sum(layer["carving_pass"] for layer in seconds)
        derived = sum(layer["bare_forward"] for layer in seconds)
        rows.append((forward, derived, carving, carving / forward, carving / derived))
    names = ("forward_s", "derived_forward_s", "carving_s", "ratio", "derived_ratio")
    for name, values in zip(names, zip(*rows, strict=True), strict=True):
        print(
            f"{name:18} median {statistics.median(values):.3f}"
            f"  (min {min(values):.3f}, max {max(values):.3f})"
        )


if __name__ == "__main__":
    main()
