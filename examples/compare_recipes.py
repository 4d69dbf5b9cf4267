# SPDX-License-Identifier: Apache-2.0
"""Reproduce the tables of quality in results/ on a model and texts of your own.

    python examples/compare_recipes.py MODEL CALIBRATION_TEXT TEXT [TEXT ...] --shape S1A1E8
    python examples/compare_recipes.py MODEL CALIBRATION_TEXT TEXT --shape S1A1E8 --table ablation
    python examples/compare_recipes.py MODEL CALIBRATION_TEXT TEXT --shape S2A2E8 --table budget

One run compares, at the activation ratio of each shape, the dense model, static pruning (all
active experts shared, nothing routed), the published recipes and ours, with the model's router, an
oracle's and a random one; or ours with one choice changed at a time, at the shape (`ablation`) or
where only the share is said (`budget`). Every text is measured on the same conversions, the tasks
on those of the first seed. One JSON object per line goes to standard output: `perplexities` of
every seed of the calibration windows, `gap` = mean ln(perplexity / dense), the error of each
layer's FFN output on the calibration tokens, the router's agreement with the oracle beside chance,
accuracy and standard error in each task and of their mean, and seconds of conversion.

With `--jobs N` there are N conversions at a time, which share a GPU: seconds then mean little.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import AutoConfig

from cmoe_hf.conversion import RECIPES, Evaluation, Recipe, convert, evaluate, evaluate_tasks
from cmoe_hf.conversion.carve.shape import Shape
from cmoe_hf.conversion.device import find_device
from cmoe_hf.conversion.measure.evaluate import quality, text_windows
from cmoe_hf.conversion.measure.routing import sparse_blocks
from cmoe_hf.conversion.source.loading import load_model
from cmoe_hf.conversion.source.texts import open_text


@dataclass(frozen=True)
class Row:
    """A conversion and the routers it is measured with."""

    name: str
    recipe: Recipe = RECIPES["refined"]
    static: bool = False
    budget: bool = False
    """Only the share of the neurons is said; experts and dense layers are chosen."""
    everywhere: bool = False
    """With the budget's number of experts in every layer: none stays dense."""
    compensated: bool = False
    """With biases for the mean of what is pruned, as in FLAP: no carved model has them."""
    finer: int = 1
    """Experts of 1 / finer the size, at equal activation."""
    more: float = 1
    """Calibration windows, relative to --samples."""
    routers: tuple[str, ...] = ("own",)


REFINED = RECIPES["refined"]
PLAIN = replace(REFINED, refit=False)
ONE_RIDGE = replace(REFINED, held_out_ridge=False)
TABLES = {
    "compare": (
        Row("released", RECIPES["released"], routers=("own", "oracle", "random")),
        Row("paper", RECIPES["paper"], routers=("own", "oracle", "random")),
        Row("static", recipe=PLAIN, static=True),
        Row("static, refitted", static=True),
        Row("FLAP", recipe=replace(PLAIN, importance="fluctuation"), static=True, compensated=True),
        Row(
            "FLAP's neurons, refitted",
            recipe=replace(REFINED, importance="fluctuation"),
            static=True,
        ),
        Row("largest weights", recipe=replace(PLAIN, importance="weight"), static=True),
        Row("largest weights, refitted", recipe=replace(REFINED, importance="weight"), static=True),
        Row("refined, budget only", budget=True),
        Row("static, layers of the budget", static=True, budget=True),
        Row("refined, no refit", recipe=PLAIN, routers=("own", "oracle", "random")),
        Row("refined"),
        Row(
            "refined for an oracle",
            recipe=replace(REFINED, routed_by="oracle"),
            routers=("oracle",),
        ),
        Row("refined for chance", recipe=replace(REFINED, routed_by="random"), routers=("random",)),
        Row("refined, split by layer", recipe=replace(REFINED, adaptive_split=True)),
    ),
    "ablation": (
        Row("refined"),
        Row("neurons by rate of marks", recipe=replace(REFINED, importance="rate")),
        Row("clusters of marks", recipe=replace(REFINED, clusters="marks")),
        Row(
            "clusters of marks, representative router",
            recipe=replace(REFINED, clusters="marks", router="representative"),
        ),
        Row("one clustering round", recipe=replace(REFINED, max_iterations=1)),
        Row("refit to the dense FFN's output", recipe=replace(REFINED, error_correction=False)),
        Row("no refit", recipe=PLAIN),
        Row("router ridge 0.001", recipe=replace(REFINED, router_ridge=0.001)),
        Row("router ridge 0.05", recipe=replace(REFINED, router_ridge=0.05)),
        Row("router ridge 5", recipe=replace(REFINED, router_ridge=5.0)),
        Row("refit ridge 0.0001", recipe=replace(ONE_RIDGE, refit_ridge=0.0001)),
        Row("refit ridge 0.03", recipe=replace(ONE_RIDGE, refit_ridge=0.03)),
        Row("1/8 of the calibration tokens", more=1 / 8),
        Row("1/4 of the calibration tokens", more=1 / 4),
        Row("4 times the calibration tokens", more=4),
        Row("16 times the calibration tokens", more=16),
        Row("experts of half the size", finer=2),
        Row("experts of a quarter of the size", finer=4),
        Row("experts of an eighth of the size", finer=8),
    ),
    "budget": (
        Row("refined", budget=True),
        Row("static", static=True, budget=True),
        Row("no layer dense", budget=True, everywhere=True),
        Row("neurons stay in their clusters", replace(REFINED, reassignments=0), budget=True),
        Row("router of the regression", replace(REFINED, router_epochs=0), budget=True),
        Row("every token counts the same", replace(REFINED, token_weights="equal"), budget=True),
        Row("ridge 0.003 everywhere", ONE_RIDGE, budget=True),
        Row(
            "refit to the dense FFN's output", replace(REFINED, error_correction=False), budget=True
        ),
        Row("neurons by rate of marks", replace(REFINED, importance="rate"), budget=True),
        Row("no refit", PLAIN, budget=True),
        Row("half of the calibration tokens", budget=True, more=1 / 2),
        Row("twice the calibration tokens", budget=True, more=2),
        Row("4 times the calibration tokens", budget=True, more=4),
        Row("16 times the calibration tokens", budget=True, more=16),
    ),
}


@dataclass(frozen=True)
class Outcome:
    """What one conversion gives."""

    report: dict[str, Any]
    evaluations: dict[tuple[str, str], Evaluation]
    """By router and text."""
    accuracies: dict[str, tuple[float, float]]


Job: TypeAlias = tuple[str, Row | None, int]
"""Shape, row and seed; no row is the dense model."""


def outcome(arguments: argparse.Namespace, job: Job) -> Outcome:
    """Convert with one seed, and measure; or measure the dense model."""
    notation, row, seed = job
    if row is None:
        return Outcome(
            report={},
            evaluations={
                ("own", text): routed(arguments.model, text, "own", arguments)
                for text in arguments.texts
            },
            accuracies=accuracies(arguments.model, arguments) if arguments.tasks else {},
        )
    shape = Shape.parse(notation)
    with tempfile.TemporaryDirectory() as folder:
        carved = Path(folder) / "carved"
        convert(
            arguments.model,
            carved,
            **parts_of(shape, row, arguments.model),
            recipe=row.recipe,
            calibration=arguments.calibration,
            samples=max(1, round(arguments.samples * row.more)),
            sequence_length=arguments.sequence_length,
            seed=seed,
        )
        measure = compensated if row.compensated else routed
        return Outcome(
            report=json.loads((carved / "conversion.json").read_text()),
            evaluations={
                (router, text): measure(carved, text, router, arguments)
                for router in routers_of(row, arguments)
                for text in arguments.texts
            },
            accuracies=accuracies(carved, arguments) if arguments.tasks and not seed else {},
        )


def outcomes(arguments: argparse.Namespace, jobs: list[Job]) -> Iterator[tuple[Job, Outcome]]:
    """In as many processes as asked for; whatever is done first comes first."""
    run = partial(outcome, arguments)
    if arguments.jobs == 1:
        yield from ((job, run(job)) for job in jobs)
        return
    # CUDA wants fresh processes; and the harness starts some of its own, so no `Pool`.
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(run, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()


def routed(carved: str | Path, text: str, router: str, arguments: argparse.Namespace) -> Evaluation:
    """Perplexity as it is."""
    return evaluate(
        carved,
        text=text,
        router=router,
        sequence_length=arguments.evaluation_length,
        windows=arguments.windows,
        dtype=arguments.dtype,
    )


def routers_of(row: Row, arguments: argparse.Namespace) -> list[str]:
    """The routers to measure a row with."""
    return [name for name in row.routers if name in (arguments.router or row.routers)]


def records(
    shape: str, row: Row, seeds: list[Outcome], dense: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """One per router and text."""
    reports = [seed.report for seed in seeds]
    settings = reports[0]["settings"]
    errors = [[layer["relative_output_error"] for layer in run["layers"]] for run in reports]
    for router, text in seeds[0].evaluations:
        results = [seed.evaluations[router, text] for seed in seeds]
        perplexities = [result.perplexity for result in results]
        agreements = [result.router_oracle_agreement for result in results]
        yield {
            "shape": shape,
            "carved": Shape(*(settings[name] for name in ("shared", "active", "experts"))).notation,
            "row": row.name,
            "router": router,
            "text": Path(text).name,
            "perplexities": perplexities,
            "mean": statistics.mean(perplexities),
            "gap": statistics.mean(math.log(value / dense[text]) for value in perplexities),
            "agreement": None if None in agreements else statistics.mean(agreements),
            "chance": results[0].router_chance_agreement,
            "errors": [round(statistics.mean(layer), 4) for layer in zip(*errors, strict=True)],
            "pinned": [[layer.get("pinned_experts") for layer in run["layers"]] for run in reports],
            "accuracies": next((seed.accuracies for seed in seeds if seed.accuracies), {}),
            "seconds": statistics.median(run["result"]["seconds"] for run in reports),
        }


def parts_of(shape: Shape, row: Row, model: str) -> dict[str, Any]:
    """What `convert` is told about experts and layers."""
    budget, dense_layers = shape.activation_ratio, ()
    if row.budget:
        dense = AutoConfig.from_pretrained(model)
        shape, dense_layers = Shape.spread(
            budget, dense.num_hidden_layers, dense.intermediate_size, None
        )
    if row.everywhere:
        return {"budget": budget, "experts": shape.experts}
    if row.budget and not row.static and row.recipe.refit:  # or no split to choose
        return {"budget": budget}
    shared, active = shape.shared, shape.active
    if row.static:
        shared, active = shared + active, 0
    counts = {"shared": shared, "active": active, "experts": shape.experts}
    counts = {name: count * row.finer for name, count in counts.items()}
    return {**counts, "dense_layers": dense_layers}


def accuracies(model: str | Path, arguments: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Accuracy and standard error in each task, and of their mean."""
    measured = evaluate_tasks(
        model,
        tasks=arguments.tasks.split(","),
        include_path=arguments.include_path,
        limit=arguments.limit,
        batch_size=8,
        dtype=arguments.dtype,
    )
    found = {row.task: (row.value, row.stderr or 0.0) for row in measured.tasks}
    values, errors = zip(*found.values(), strict=True)
    return {**found, "mean": (statistics.mean(values), math.hypot(*errors) / len(errors))}


@torch.no_grad()
def compensated(carved: Path, text: str, router: str, arguments: argparse.Namespace) -> Evaluation:
    """Perplexity with what FLAP adds: the mean of what was pruned, measured on calibration text."""
    device, length = find_device(None), arguments.evaluation_length
    model, tokenizer = load_model(carved, arguments.dtype, device, False)
    dense, _ = load_model(arguments.model, arguments.dtype, device, False)
    for block, layer in zip(sparse_blocks(model), dense.base_model.layers, strict=True):
        block.register_forward_hook(Compensation(layer.mlp))
    calibration = open_text(arguments.calibration)
    windows_WL = text_windows(model, tokenizer, calibration, length, arguments.samples)
    model.base_model(windows_WL.to(device))
    windows_WL = text_windows(model, tokenizer, open_text(text), length, arguments.windows)
    value = quality(model, windows_WL, description="compensated").perplexity
    return Evaluation(
        perplexity=value,
        tokens=windows_WL[:, 1:].numel(),
        sequence_length=length,
        windows=arguments.windows,
        baseline_perplexity=None,
        router=router,
        router_oracle_agreement=None,
        router_chance_agreement=None,
    )


class Compensation:
    """A hook that adds the mean of what the dense FFN writes beside the pruned one, measured on the
    first batch that it sees."""

    def __init__(self, dense: torch.nn.Module) -> None:
        self.dense, self.bias = dense, None

    def __call__(self, block: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            self.bias = (self.dense(inputs[0]) - output).mean(dim=(0, 1))
        return output + self.bias


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--shape", action="append", help="for example S3A3E8; repeatable")
    parser.add_argument("--table", choices=TABLES, default="compare")
    parser.add_argument("--row", action="append", help="only this row of the table; repeatable")
    parser.add_argument("--jobs", type=int, default=1, help="conversions at a time")
    parser.add_argument("--router", action="append", help="only rows with this one; repeatable")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--evaluation-length", type=int, help="default --sequence-length")
    parser.add_argument("--windows", type=int, help="of each text, default all")
    parser.add_argument("--dtype", help="of evaluation, for example float32")
    parser.add_argument("--tasks", help="of the harness, separated by commas; first seed only")
    parser.add_argument("--include-path", type=Path)
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    arguments.evaluation_length = arguments.evaluation_length or arguments.sequence_length
    table = {row.name: row for row in TABLES[arguments.table]}
    cases = [
        (shape, table[name])
        for name in arguments.row or table
        if name in table and routers_of(table[name], arguments)
        for shape in arguments.shape or ["S1A1E8", "S2A2E8", "S3A3E8"]
    ]
    jobs: list[Job] = [(*case, seed) for case in cases for seed in range(arguments.seeds)]
    dense: dict[str, float] = {}
    done: dict[tuple[str, Row], dict[int, Outcome]] = {case: {} for case in cases}
    for (shape, row, seed), found in outcomes(arguments, [("", None, 0), *jobs]):
        if row is not None:
            done[shape, row][seed] = found
        else:
            for (_, text), evaluation in found.evaluations.items():
                dense[text] = evaluation.perplexity
                record = {"row": "dense", "text": Path(text).name, "mean": evaluation.perplexity}
                print(json.dumps({**record, "accuracies": found.accuracies}), flush=True)
        complete = [case for case in done if dense and len(done[case]) == arguments.seeds]
        for case in complete:
            seeds = [found for _, found in sorted(done.pop(case).items())]
            for record in records(*case, seeds, dense):
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
