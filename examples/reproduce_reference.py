"""Reproduce the quality tables of RESULTS.md on a model and texts of your own.

    python examples/reproduce_reference.py MODEL CALIBRATION_TEXT TEXT [TEXT ...] --shape S1A1E8

For every shape and recipe: the carved model with its own router, an oracle's and a random one, and
static pruning by the same recipe at the same activation ratio (all active experts shared). Each
text is measured with the same conversion. One JSON object per line goes to standard output, with
every seed of the calibration windows and the mean.
"""

import argparse
import json
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cmoe_hf.conversion import convert, evaluate

KINDS = ("own", "oracle", "random", "static")


def measure(arguments: argparse.Namespace, shape: str, recipe: str) -> Iterator[dict[str, Any]]:
    """One record per kind of routing and text."""
    shared, active, experts = map(int, re.fullmatch(r"S(\d+)A(\d+)E(\d+)", shape).groups())
    protocol = {"sequence_length": arguments.sequence_length}
    runs = defaultdict(list)
    for seed in range(arguments.seeds):
        for kinds in (set(arguments.kind) - {"static"}, set(arguments.kind) & {"static"}):
            if not kinds:
                continue
            static = "static" in kinds
            with tempfile.TemporaryDirectory() as folder:
                carved = Path(folder) / "carved"
                convert(
                    arguments.model,
                    carved,
                    shared=shared + active if static else shared,
                    active=0 if static else active,
                    experts=experts,
                    recipe=recipe,
                    calibration=arguments.calibration,
                    samples=arguments.samples,
                    seed=seed,
                    **protocol,
                )
                for kind in sorted(kinds):
                    router = "own" if static else kind
                    for text in arguments.texts:
                        result = evaluate(carved, text=text, router=router, **protocol)
                        runs[kind, Path(text).name].append(result)
    for (kind, text), results in runs.items():
        perplexities = [result.perplexity for result in results]
        agreements = [result.router_oracle_agreement for result in results]
        yield {
            "shape": shape,
            "recipe": recipe,
            "kind": kind,
            "text": text,
            "perplexities": perplexities,
            "mean": statistics.mean(perplexities),
            "agreement": None if None in agreements else statistics.mean(agreements),
            "chance": results[0].router_chance_agreement,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--shape", action="append", help="for example S3A3E8; repeatable")
    parser.add_argument("--recipe", action="append", help="repeatable; default all three")
    parser.add_argument("--kind", action="append", choices=KINDS, help="repeatable; default all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=256)
    arguments = parser.parse_args()
    arguments.kind = arguments.kind or KINDS
    for text in arguments.texts:
        dense = evaluate(arguments.model, text=text, sequence_length=arguments.sequence_length)
        record = {"recipe": "dense", "text": Path(text).name, "mean": dense.perplexity}
        print(json.dumps(record), flush=True)
    for shape in arguments.shape or ["S1A1E8", "S2A2E8", "S3A3E8"]:
        for recipe in arguments.recipe or ["released", "paper", "refined"]:
            for record in measure(arguments, shape, recipe):
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
