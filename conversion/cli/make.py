# SPDX-License-Identifier: Apache-2.0
"""The commands that make models."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import yaml
from rich.table import Table

from ..carve.recipe import Recipe
from ..carve.settings import ConvertOptions, Settings
from ..carve.shape import engines_of_width
from ..convert import convert
from ..convert import resume as resume_conversion
from ..demo import DemoOptions, demo
from ..embedded import HELD_OUT, MODEL
from ..errors import CMoEError, RequestError
from ..folder.layerwise import WorkFolder
from ..options import narrowed
from ..plan import Plan, plan, prepare_work
from ..show.report import report
from ..source.texts import OWN, Portion
from ..tune.distil import TrainingPlan
from ..tune.prepare import RecoverOptions
from ..tune.recover import Recovery, RecoveryFolder, plan_recovery, recover, resume_recovery
from ..tune.settings import Tuning, some
from .command import command
from .printing import Printed, agreement, facts, table


@command("demo", DemoOptions)
def demo_command(**given: Any) -> Printed:
    """Carve the embedded default, recover it, and compare; draw a report if it is kept."""
    result = demo(**given)
    title = "on text that the models have not seen"
    shapes = table(title, "", "FFN runs", "perplexity", "more than dense", "divergence")
    shapes.add_row("dense", "100 %", f"{result.dense_perplexity:.2f}", "", "")
    for point in result.shapes:
        share, more = point.activation_ratio, point.perplexity / result.dense_perplexity - 1
        name = f"{'recovered' if point.recovered else 'carved'} {point.notation}"
        far = "" if point.divergence is None else f"{point.divergence:.3f}"
        figures = f"{point.perplexity:.2f}", f"{more * 100:.1f} %"
        shapes.add_row(name, f"{share * 100:.0f} %", *figures, far)
    agree = agreement(result.router_oracle_agreement, result.router_chance_agreement)
    lines = [
        f"router picks the oracle's experts: {agree}",
        f"a prompt of 256 tokens: {result.speedup:.2f} times as fast as dense (so small a model "
        "gains little: see `cmoe benchmark --shape tinyllama-1.1b --layers 2`)",
        f"dense continues: {result.generated_dense}",
        f"{result.notation} continues: {result.generated}",
    ]
    if result.output is None:
        lines.append("recovered model: gone; `cmoe demo OUT` keeps it and draws a report")
    else:  # without PNG files, which need an extra
        drawn = report(result.output, baseline=MODEL, text=HELD_OUT, windows=8, figures=False)
        lines += [f"recovered model: {result.output}", f"report: {drawn.output}"]
    return Printed(result, [shapes, *lines])


@dataclass(frozen=True, kw_only=True)
class ConvertMode:
    """What `convert` does besides converting."""

    change: list[str] | None = None
    """Change one choice of the recipe, KEY=VALUE; repeatable. For ablations."""
    resume: bool = False
    """Go on with the unfinished conversion into OUT: cmoe convert OUT --resume."""
    dry_run: bool = False
    """Check everything, say what it would take, and stop."""
    recover: str | None = None
    """Recover afterwards, on so many tokens that the dense model writes, for example 500k: the
    carved model is OUT-carved then, and OUT the recovered one. Goes with --resume."""


@command("convert", ConvertOptions, ConvertMode, optional=["output"])
def convert_command(
    model: str,
    output: str | None = None,
    change: list[str] | None = None,
    resume: bool = False,
    dry_run: bool = False,
    recover: str | None = None,
    **given: Any,
) -> Printed:
    """Convert, go on with a conversion, or only plan one."""
    if change:
        recipe = given.get("recipe", Settings.recipe)
        given["recipe"] = Recipe.of(recipe, **_changes(change))
    if resume and (dry_run or ("overwrite" in given and recover is None)):
        raise RequestError("--resume goes with neither --dry-run nor --overwrite.")
    if recover is not None and not dry_run:
        if output is None:
            raise RequestError("--recover needs the model: cmoe convert MODEL OUT --recover 500k.")
        recovery = _convert_and_recover(model, output, recover, resume, given)
        return Printed(recovery, [_recovery_table(recovery), recovery.output])
    if resume:
        named = {} if output is None else {"model": model}
        result = resume_conversion(model if output is None else output, given | named)
    elif output is None:
        raise RequestError("say where to: cmoe convert MODEL OUT.")
    elif dry_run:
        planned = plan(model, output, **given)
        printed: list[Any] = [_plan_table(model, planned)]
        if recover is not None:
            then = _planned_recovery(model, output, recover, given)
            printed.append(f"then, on {recover} tokens: {then.reason}")
        return Printed(planned, printed)
    else:
        result = convert(model, output, **given)
    rows = {
        "output": result.output,
        "FFN neurons run per token": f"{result.activation_ratio:.1%}",
        "calibration tokens": f"{result.calibration_tokens:,}",
        "error of the FFN outputs": f"{result.relative_output_error:.1%}",
        "seconds": f"{result.seconds:.1f}",
        "carving pass / bare forward pass": f"{result.carving_ratio:.2f}",
        "peak memory": f"{result.peak_memory_bytes / 1e9:.2f} GB",
    }
    return Printed(result, [facts(f"carved to {result.notation}", rows)])


def _planned_recovery(model: str, output: str, tokens: str, given: dict[str, Any]) -> TrainingPlan:
    """Plan the recovery into OUT of what will be OUT-carved. Raises `RequestError`."""
    asked = some(Portion.of(f"{OWN}:{tokens}").tokens)
    settings = narrowed(ConvertOptions(model, output, **given), Settings)
    carving, _ = prepare_work(model, f"{output}-carved", settings)
    return plan_recovery(carving, RecoveryFolder(output), asked)


def _convert_and_recover(
    model: str, output: str, tokens: str, resume: bool, given: dict[str, Any]
) -> Recovery:
    """Carve into OUT-carved and recover from it into OUT, or go on with what is unfinished."""
    overwrite = given.get("overwrite", False)
    carved = WorkFolder(f"{output}-carved")
    recovered = RecoveryFolder(output, overwrite=overwrite)
    try:
        if resume and recovered.partial.exists():
            return resume_recovery(output)
        recovered.check({"the model": model})
        if not resume:
            _planned_recovery(model, output, tokens, given)
            convert(model, carved.output, **given)
        elif carved.partial.exists():
            asked = {name: value for name, value in given.items() if name != "overwrite"}
            resume_conversion(carved.output, asked | {"model": model})
        also = ("device", "max_shard_size", "trust_remote_code")
        return recover(
            carved.output,
            output,
            teacher=model if Path(model).is_dir() else None,  # else of the commit that was carved
            training=f"{OWN}:{tokens}",
            text=HELD_OUT,
            overwrite=overwrite,
            **{name: given[name] for name in also if name in given},
        )
    except (CMoEError, KeyboardInterrupt) as error:
        if recovered.partial.exists() or carved.partial.exists():
            error.__notes__ = ["The same command with --resume goes on."]
        raise


def _changes(pairs: list[str]) -> dict[str, Any]:
    """Return `KEY=VALUE` pairs as a dictionary, with values that are numbers or YAML."""
    changes = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise RequestError(f"--change {pair} is not of the form KEY=VALUE.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RequestError(f"--change {pair} has no value that can be read.") from error
        if isinstance(value, str):
            with suppress(ValueError):  # YAML takes 1e-3 for a word
                value = float(value)
        changes[key.strip().replace("-", "_")] = value
    return changes


def _plan_table(model: str, it: Plan) -> Table:
    gain = f"about {it.speedup_expected:.1f} on a CPU"
    if it.speedup_expected < 1.05:
        gain = "no gain to be had on a CPU"
    disk, working = it.disk_bytes / 1e9, (it.disk_bytes + it.work_bytes) / 1e9
    peak, available = it.peak_memory_bytes / 1e9, it.memory_available_bytes / 1e9
    rows = {
        "layers": f"{it.layers} of hidden size {it.hidden_size}",
        "FFN width": f"{it.ffn_width} = experts of {it.expert_width} neurons "
        f"({engines_of_width(it.expert_width)})",
        "parameters": f"{it.parameters:,}",
        "run for a token": f"{it.active_parameters:,} ({it.activation_ratio:.1%} of the FFN "
        "neurons)",
        "decoding": f"at most {it.speedup_bound:.2f} times as fast as the dense model, {gain}",
        "calibration tokens": f"{it.calibration_tokens:,}, activations in {it.activations}",
        "disk for the result": f"{disk:.2f} GB",
        "disk while working": f"{working:.2f} GB ({it.disk_free_bytes / 1e9:.2f} GB free)",
        "peak memory": f"{peak:.2f} GB ({available:.2f} GB available)",
        "time": f"about {it.seconds / 60:.0f} minutes on {it.device}",
    }
    if it.warnings:
        rows["warning"] = " ".join(it.warnings)
    return facts(f"{model} to {it.notation}: nothing was written", rows)


@dataclass(frozen=True, kw_only=True)
class RecoverMode:
    """What `recover` does besides recovering."""

    resume: bool = False
    """Go on with the unfinished recovery into OUT: cmoe recover OUT --resume."""


@command("recover", RecoverOptions, Tuning, RecoverMode, optional=["output"])
def recover_command(
    model: str, output: str | None = None, resume: bool = False, **given: Any
) -> Printed | None:
    """Run a recovery, or go on with one; one of several processes prints."""
    if resume:
        if output is not None or "overwrite" in given:
            raise RequestError("--resume takes the output folder only: cmoe recover OUT --resume.")
        result = resume_recovery(model)
    elif output is None:
        raise RequestError("say where to: cmoe recover MODEL OUT.")
    else:
        tuning = {name: given.pop(name) for name in given.keys() & vars(Tuning()).keys()}
        result = recover(model, output, tuning=Tuning(**tuning), **given)
    is_main = accelerate.PartialState().is_main_process
    return Printed(result, [_recovery_table(result), result.output]) if is_main else None


WHEN = ("before", "after")
CLOSENESS = {
    "divergence from the dense model": "divergence",
    "most likely token as the dense model's": "agreement",
}


def _recovery_table(it: Recovery) -> Table:
    title = f"{it.notation} after {it.steps} steps on {it.training_tokens:,} tokens"
    made = table(title, "", *WHEN)
    for row in it.texts:
        dense = row["before"].get("baseline_perplexity")
        for name, figure in (("perplexity", "perplexity"), *CLOSENESS.items()):
            if figure in row["before"]:
                beside = f" (dense {dense:.3f})" if dense and figure == "perplexity" else ""
                label = f"{name} on {row['text']}{beside}"
                made.add_row(label, *(_decimal(row[when][figure]) for when in WHEN))
    for label, name in (
        ("log-perplexity gap to the dense model", "gap"),
        ("imbalance of the experts' loads", "imbalance"),
        ("the same on the training text", "training_imbalance"),
    ):
        figures = [getattr(it, f"{name}_{when}", None) for when in WHEN]
        if any(figure is not None for figure in figures):
            made.add_row(label, *map(_decimal, figures))
    made.add_row("mean |u|", "", _decimal(it.scale))
    made.add_row("distance to the dense model closed", "", _decimal(it.closed))
    return made


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
