"""Reproduce the quality tables of RESULTS.md on a model and two texts of your own.

    python examples/reproduce_reference.py MODEL CALIBRATION_TEXT TEST_TEXT --shape S1A1E8

For every shape: the dense model, static pruning at the same activation ratio (all active experts
shared), and both recipes with their own router, an oracle and chance. Means over the seeds of the
calibration windows; one JSON object per line goes to standard output.
"""

import argparse
import json
import re
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

from cmoe_hf.conversion import convert, evaluate


def rows(shared: int, active: int) -> Iterator[tuple[str, int, int, str, str]]:
    """(name, S, A, recipe, router) of every row at one activation ratio."""
    for recipe in ("released", "paper"):
        yield f"{recipe}", shared, active, recipe, "own"
        yield f"{recipe}, oracle router", shared, active, recipe, "oracle"
        yield f"{recipe}, random router", shared, active, recipe, "random"
        yield f"{recipe} profile, static", shared + active, 0, recipe, "own"


def measure(arguments: argparse.Namespace, shape: str) -> Iterator[dict[str, Any]]:
    """One record per row of a shape."""
    shared, active, experts = map(int, re.fullmatch(r"S(\d+)A(\d+)E(\d+)", shape).groups())
    for name, s, a, recipe, router in rows(shared, active):
        runs = []
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory() as folder:
                convert(
                    arguments.model,
                    f"{folder}/carved",
                    shared=s,
                    active=a,
                    experts=experts,
                    recipe=recipe,
                    calibration=arguments.calibration,
                    samples=arguments.samples,
                    sequence_length=arguments.sequence_length,
                    seed=seed,
                )
                runs.append(
                    evaluate(
                        f"{folder}/carved",
                        baseline=arguments.model if seed == 0 else None,
                        text=arguments.text,
                        sequence_length=arguments.sequence_length,
                        router=router,
                    )
                )
        agreements = [run.router_oracle_agreement for run in runs]
        yield {
            "shape": shape,
            "row": name,
            "dense": runs[0].baseline_perplexity,
            "perplexities": [run.perplexity for run in runs],
            "mean": statistics.mean(run.perplexity for run in runs),
            "agreement": None if None in agreements else statistics.mean(agreements),
            "chance": runs[0].router_chance_agreement,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("text")
    parser.add_argument("--shape", action="append", help="for example S3A3E8; repeatable")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=256)
    arguments = parser.parse_args()
    for shape in arguments.shape or ["S1A1E8", "S2A2E8", "S3A3E8"]:
        for record in measure(arguments, shape):
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
