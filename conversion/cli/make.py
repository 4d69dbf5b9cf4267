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

from ..carve.settings import MAX_SHARD_SIZE, Options, absolute
from ..convert import convert, resume
from ..demo import demo
from ..device import DTYPES
from ..errors import RequestError
from ..plan import Plan, plan
from ..source.texts import absolute_text
from ..tune.recover import Recovery, recover, resume_recovery
from ..tune.tuning import SCHEDULES, Tuning
from .common import (
    Active,
    Change,
    ConfigFile,
    Debug,
    Device,
    Experts,
    Json,
    MaxShardSize,
    Overwrite,
    Recipe,
    Revision,
    SequenceLength,
    Shared,
    TrustRemoteCode,
    agreement,
    print_result,
    reporting,
    table_of,
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
    recipe: Recipe = "refined",
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

    def table() -> Table:
        table = Table("", "dense", f"carved {result.notation}", title="held-out text")
        table.add_row(
            "perplexity", f"{result.dense_perplexity:.2f}", f"{result.carved_perplexity:.2f}"
        )
        table.add_row("FFN neurons run per token", "100 %", f"{result.activation_ratio:.0%}")
        table.add_row(
            "router picks the oracle's experts",
            "",
            agreement(result.router_oracle_agreement, result.router_chance_agreement),
        )
        table.caption = f"carved model: {result.output}" if result.output else None
        return table

    print_result(result, as_json, table)
    if not as_json:
        Console().print(f"generated: {result.generated}", markup=False, highlight=False)


def convert_command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a dense model.")],
    out: Annotated[
        Path | None, typer.Argument(help="Folder to create. With --resume, give only this one.")
    ] = None,
    experts: Annotated[
        int | None, typer.Option(help="Experts in all (E); must divide the FFN width.")
    ] = None,
    shared: Annotated[int | None, typer.Option(help="Shared experts, always on (S).")] = None,
    active: Annotated[int | None, typer.Option(help="Routed experts run per token (A).")] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Share of the FFN neurons to run, instead of --active: each layer decides on "
            "held-out calibration tokens how many of them always run."
        ),
    ] = None,
    recipe: Recipe = "refined",
    calibration: Annotated[
        str,
        typer.Option(
            help="Text, JSONL or parquet file, wikitext2, c4, or dataset[:subset][:split][:column]."
        ),
    ] = "wikitext2",
    samples: Annotated[
        int | None, typer.Option(help="Calibration windows; default 16,384 tokens' worth.")
    ] = None,
    sequence_length: SequenceLength = None,
    k_act: Annotated[int, typer.Option(help="Neurons marked per token (K_a).")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the windows' offsets.")] = 0,
    change: Change = None,
    device: Device = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"{', '.join(DTYPES)}; default the source's precision.")
    ] = None,
    activations: Annotated[
        str,
        typer.Option(
            help="Where the calibration activations are kept: memory, disk, or auto: on the disk "
            "if they would not fit into memory."
        ),
    ] = "auto",
    revision: Revision = None,
    max_shard_size: MaxShardSize = MAX_SHARD_SIZE,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
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
        options = Options(
            experts=experts or 0,
            shared=shared,
            active=active,
            budget=budget,
            recipe=recipe,
            changes=_changes(change or []),
            calibration=calibration,
            samples=samples,
            sequence_length=sequence_length,
            k_act=k_act,
            seed=seed,
            device=device,
            dtype=dtype,
            activations=activations,
            revision=revision,
            max_shard_size=max_shard_size,
            trust_remote_code=trust_remote_code,
        )
        if resume_it:
            if dry_run or overwrite:
                raise RequestError("--resume goes with neither --dry-run nor --overwrite.")
            result = resume(model if out is None else out, _given(context, model, out, options))
        elif out is None:
            raise RequestError("say where to: cmoe convert MODEL OUT.")
        elif experts is None:
            raise RequestError("say into how many experts: --experts.")
        elif dry_run:
            planned = plan(model, out, overwrite=overwrite, **options)
            print_result(planned, as_json, lambda: _plan_table(model, planned))
            return
        else:
            result = convert(model, out, overwrite=overwrite, **options)
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


def _given(
    context: typer.Context, model: str, out: Path | None, options: Options
) -> dict[str, Any]:
    """What the command line says beside --resume, by the names of the settings."""
    given = {
        name: value
        for name, value in options.items()
        if (source := context.get_parameter_source("change" if name == "changes" else name))
        and source.name != "DEFAULT"
    }
    if "calibration" in given:
        given["calibration"] = absolute_text(str(given["calibration"]))
    return given | ({} if out is None else {"model": absolute(model)})


def _plan_table(model: str, planned: Plan) -> Table:
    def size(count: float) -> str:
        return f"{count / 1e9:.2f} GB"

    rows = {
        "layers": f"{planned.layers} of hidden size {planned.hidden_size}",
        "FFN width": f"{planned.ffn_width} = experts of {planned.expert_width} neurons",
        "parameters": f"{planned.parameters:,}",
        "run for a token": f"{planned.active_parameters:,} "
        f"({planned.activation_ratio:.1%} of the FFN neurons)",
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


_TUNING = Tuning()


def recover_command(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a carved model.")],
    out: Annotated[
        Path | None, typer.Argument(help="Folder to create. With --resume, give only this one.")
    ] = None,
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
    samples: Annotated[int, typer.Option(help="Training windows.")] = _TUNING.samples,
    sequence_length: SequenceLength = None,
    epochs: Annotated[float, typer.Option(help="Passes over the windows.")] = _TUNING.epochs,
    batch_size: Annotated[
        int, typer.Option(help="Windows of one optimiser step, over all processes.")
    ] = _TUNING.batch_size,
    micro_batch_size: Annotated[
        int | None, typer.Option(help="Windows at a time on each process; default all it gets.")
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of the LoRA factors.")] = _TUNING.rank,
    alpha: Annotated[int, typer.Option(help="LoRA scaling: alpha / rank.")] = _TUNING.alpha,
    learning_rate: Annotated[
        float, typer.Option(help="Of the LoRA factors.")
    ] = _TUNING.learning_rate,
    router_learning_rate: Annotated[
        float, typer.Option(help="Of the gate scales u, and of trained routers.")
    ] = _TUNING.router_learning_rate,
    adam_beta1: Annotated[float, typer.Option()] = _TUNING.adam_beta1,
    adam_beta2: Annotated[float, typer.Option()] = _TUNING.adam_beta2,
    schedule: Annotated[
        str, typer.Option(help=f"Of the learning rates: {', '.join(SCHEDULES)}.")
    ] = _TUNING.schedule,
    warmup_steps: Annotated[
        int, typer.Option(help="Steps to reach the learning rates.")
    ] = _TUNING.warmup_steps,
    bias_speed: Annotated[
        float,
        typer.Option(help="First step of the balance biases; falls to 0. 0: leave them alone."),
    ] = _TUNING.bias_speed,
    train_router: Annotated[
        bool, typer.Option("--train-router", help="Train the routers, too.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of windows, order and LoRA factors.")] = 0,
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
                tuning=Tuning(
                    samples=samples,
                    sequence_length=sequence_length,
                    epochs=epochs,
                    batch_size=batch_size,
                    micro_batch_size=micro_batch_size,
                    rank=rank,
                    alpha=alpha,
                    learning_rate=learning_rate,
                    router_learning_rate=router_learning_rate,
                    adam_beta1=adam_beta1,
                    adam_beta2=adam_beta2,
                    schedule=schedule,
                    warmup_steps=warmup_steps,
                    bias_speed=bias_speed,
                    train_router=train_router,
                    gradient_checkpointing=gradient_checkpointing,
                    seed=seed,
                ),
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
