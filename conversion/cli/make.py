# SPDX-License-Identifier: Apache-2.0
"""The commands that make models."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import accelerate
import typer
import yaml
from rich.console import Console
from rich.table import Table

from ..carve.recipe import Recipe
from ..carve.settings import MAX_SHARD_SIZE, Settings
from ..convert import convert, resume
from ..demo import HELD_OUT, Demo, demo
from ..errors import RequestError
from ..plan import Plan, plan
from ..show.report import report
from ..tune.recover import Recovery, recover, resume_recovery
from ..tune.tuning import Tuning
from .common import (
    Active,
    ConfigFile,
    Debug,
    Device,
    Experts,
    Json,
    MaxShardSize,
    Overwrite,
    RecipeName,
    Shared,
    TrustRemoteCode,
    agreement_in_words,
    print_result,
    reporting,
    table_of,
    with_options,
)


def _changes(pairs: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` pairs as a dictionary; values are read as Python's numbers, or as YAML."""
    changes = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise RequestError(f"--change {pair} is not of the form KEY=VALUE.")
        changes[key.strip().replace("-", "_")] = _value(pair, value)
    return changes


def _value(pair: str, value: str) -> Any:
    for number in (int, float):  # YAML takes 1e-3 for a word
        with suppress(ValueError):
            return number(value)
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RequestError(f"--change {pair} has no value that can be read.") from error


def demo_command(
    out: Annotated[
        Path | None, typer.Argument(help="Keep the carved model in this folder.")
    ] = None,
    shared: Shared = 3,
    active: Active = 3,
    experts: Experts = 8,
    recipe: RecipeName = "refined",
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Carve the embedded default, compare dense and carved, generate a line of text."""
    with reporting(debug):
        result = demo(
            out,
            shared=shared,
            active=active,
            experts=experts,
            recipe=recipe,
            overwrite=overwrite,
        )
        page = drawn(result.output) if result.output else None
    print_result(result, as_json, lambda: _demo_table(result))
    if as_json:
        return
    agreement = agreement_in_words(result.router_oracle_agreement, result.router_chance_agreement)
    last = {
        "router picks the oracle's experts": agreement,
        "dense continues": result.generated_dense,
        f"{result.notation} continues": result.generated,
        "carved model": result.output or "gone; `cmoe demo OUT` keeps it and draws a report",
        "report": page,
    }
    for name, told in last.items():
        if told:
            is_text = name.endswith("continues")  # a path is not to be broken
            Console(soft_wrap=not is_text).print(f"{name}: {told}", markup=False, highlight=False)


def drawn(folder: str) -> str:
    """The page of a report about the demo's model, without PNG files: they need an extra."""
    return report(folder, text=HELD_OUT, windows=8, figures=False).output


def _demo_table(result: Demo) -> Table:
    title = "perplexity on text that the model has not seen"
    columns = ("", "FFN runs", "perplexity", "more than dense")
    table = Table(*columns, title=title, title_justify="left")
    table.add_row("dense", "100 %", f"{result.dense_perplexity:.2f}", "")
    for point in result.shapes:
        table.add_row(
            f"carved {point.notation}",
            f"{point.activation_ratio:.0%}".replace("%", " %"),
            f"{point.perplexity:.2f}",
            f"{point.perplexity / result.dense_perplexity - 1:.0%}".replace("%", " %"),
        )
    return table


@with_options(Settings)
def convert_command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a dense model.")],
    out: Annotated[
        Path | None, typer.Argument(help="Folder to create. With --resume, give only this one.")
    ] = None,
    *,
    options: dict[str, Any],
    change: Annotated[
        list[str] | None,
        typer.Option(help="Change one choice of the recipe, KEY=VALUE; repeatable. For ablations."),
    ] = None,
    resume_it: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the unfinished conversion into OUT."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what it would take, and stop.")
    ] = False,
    config: ConfigFile = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Carve MODEL into a CMoE repository at OUT, or go on with it: cmoe convert OUT --resume."""
    with reporting(debug):
        if change:
            recipe = options.get("recipe", Settings.recipe)
            options["recipe"] = Recipe.of(recipe, **_changes(change))
        if resume_it:
            if dry_run or "overwrite" in options:
                raise RequestError("--resume goes with neither --dry-run nor --overwrite.")
            named = {} if out is None else {"model": model}
            result = resume(model if out is None else out, options | named)
        elif out is None:
            raise RequestError("say where to: cmoe convert MODEL OUT.")
        elif dry_run:
            planned = plan(model, out, **options)
            print_result(planned, as_json, lambda: _plan_table(model, planned))
            return
        else:
            result = convert(model, out, **options)
    rows = {
        "output": result.output,
        "FFN neurons run per token": f"{result.activation_ratio:.1%}",
        "calibration tokens": f"{result.calibration_tokens:,}",
        "error of the FFN outputs": f"{result.relative_output_error:.1%}",
        "seconds": f"{result.seconds:.1f}",
        "carving pass / bare forward pass": f"{result.carving_ratio:.2f}",
        "peak memory": f"{result.peak_memory_bytes / 1e9:.2f} GB",
    }
    print_result(result, as_json, lambda: table_of(f"carved to {result.notation}", rows))


def _plan_table(model: str, planned: Plan) -> Table:
    def size(count: float) -> str:
        return f"{count / 1e9:.2f} GB"

    gain = f"about {planned.speedup_expected:.1f} on a CPU"
    if planned.speedup_expected < 1.05:
        gain = "no gain to be had on a CPU"
    rows = {
        "layers": f"{planned.layers} of hidden size {planned.hidden_size}",
        "FFN width": f"{planned.ffn_width} = experts of {planned.expert_width} neurons",
        "parameters": f"{planned.parameters:,}",
        "run for a token": f"{planned.active_parameters:,} "
        f"({planned.activation_ratio:.1%} of the FFN neurons)",
        "decoding": f"at most {planned.speedup_bound:.2f} times as fast as the dense model, {gain}",
        "calibration tokens": f"{planned.calibration_tokens:,}, activations in "
        f"{planned.activations}",
        "disk for the result": size(planned.disk_bytes),
        "disk while working": size(planned.disk_bytes + planned.work_bytes)
        + f" ({size(planned.disk_free_bytes)} free)",
        "peak memory": size(planned.peak_memory_bytes)
        + f" ({size(planned.memory_available_bytes)} available)",
        "time": f"about {planned.seconds / 60:.0f} minutes on {planned.device}",
    }
    if planned.warnings:
        rows["warning"] = " ".join(planned.warnings)
    return table_of(f"{model} to {planned.notation}: nothing was written", rows)


@with_options(Tuning)
def recover_command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a carved model.")],
    out: Annotated[
        Path | None, typer.Argument(help="Folder to create. With --resume, give only this one.")
    ] = None,
    *,
    training: Annotated[
        str, typer.Option(help="Text to learn from: file, wikitext2, c4 or a Hub data set.")
    ] = "wikitext2",
    text: Annotated[str, typer.Option(help="Text to measure perplexity on.")] = "wikitext2",
    teacher: Annotated[
        str | None, typer.Option(help="Learn the next-token distribution of this dense model.")
    ] = None,
    control: Annotated[
        str | None, typer.Option(help="The dense model: tune it by the same recipe and compare.")
    ] = None,
    options: dict[str, Any],
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; default the checkpoint's precision.")
    ] = None,
    device: Device = None,
    max_shard_size: MaxShardSize = MAX_SHARD_SIZE,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    resume_it: Annotated[
        bool, typer.Option("--resume", help="Go on with the unfinished recovery into OUT.")
    ] = False,
    config: ConfigFile = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a carved MODEL with LoRA into OUT, or go on: cmoe recover OUT --resume."""
    with reporting(debug):
        if resume_it:
            if out is not None or overwrite:
                raise RequestError(
                    "--resume takes the output folder only: cmoe recover OUT --resume."
                )
            result = resume_recovery(model)
        elif out is None:
            raise RequestError("say where to: cmoe recover MODEL OUT.")
        else:
            result = recover(
                model,
                out,
                training=training,
                text=text,
                teacher=teacher,
                control=control,
                tuning=Tuning(**options),
                dtype=dtype,
                device=device,
                max_shard_size=max_shard_size,
                trust_remote_code=trust_remote_code,
                overwrite=overwrite,
            )
    if accelerate.PartialState().is_main_process:
        print_result(result, as_json, lambda: _recovery_table(result))


def _recovery_table(result: Recovery) -> Table:
    def figure(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    table = Table(
        *("", "before", "after", "bias zero"),
        title=f"{result.notation} after {result.steps} steps on {result.training_tokens:,} tokens",
        title_justify="left",
        caption=result.output,
    )
    for name, *values in (
        (
            "perplexity",
            result.perplexity_before,
            result.perplexity_after,
            result.perplexity_after_without_bias,
        ),
        ("perplexity of the dense control", result.control_before, result.control_after, None),
        ("log-perplexity gap to the dense model", result.gap_before, result.gap_after, None),
        (
            "imbalance of the experts' loads",
            result.imbalance_before,
            result.imbalance_after,
            result.imbalance_after_without_bias,
        ),
        (
            "the same on the training text",
            result.training_imbalance_before,
            result.training_imbalance_after,
            None,
        ),
        ("mean |u|", None, result.scale, None),
        ("distance to the tuned dense model closed", None, result.closed, None),
    ):
        table.add_row(name, *map(figure, values))
    return table
