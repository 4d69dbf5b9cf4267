# SPDX-License-Identifier: Apache-2.0
"""The commands that measure models."""

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..device import DTYPES
from ..errors import RequestError
from ..measure.benchmark import Benchmark, benchmark
from ..measure.engine import EngineBenchmark, EnginePoint, benchmark_gguf
from ..measure.evaluate import ROUTERS, Evaluation, evaluate
from ..measure.shapes import SHAPES
from ..measure.tasks import TaskEvaluation, evaluate_tasks
from ..measure.timing import LABELS, Point
from ..share.gguf_file import export_gguf
from ..show.figures import check_plot, plot
from .common import (
    Active,
    Debug,
    Device,
    Experts,
    Json,
    SequenceLength,
    Shared,
    TrustRemoteCode,
    agreement_in_words,
    is_given,
    print_result,
    reporting,
    table_of,
)

PERPLEXITY_OPTIONS = ("text", "sequence_length", "windows", "router", "seed")
TASK_OPTIONS = ("few_shot", "limit", "include_path", "batch_size")


def evaluate_command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a carved or dense model.")],
    baseline: Annotated[
        str | None, typer.Option(help="The dense model, measured in the same run.")
    ] = None,
    text: Annotated[
        str, typer.Option(help="Text file, wikitext2, c4 or a Hub data set.")
    ] = "wikitext2",
    sequence_length: SequenceLength = None,
    windows: Annotated[
        int | None, typer.Option(help="Only the first windows of the text, for a quick look.")
    ] = None,
    router: Annotated[
        str, typer.Option(help=f"Who routes: {', '.join(ROUTERS)}; own is the model's router.")
    ] = "own",
    seed: Annotated[int, typer.Option(help="Seed of the random router.")] = 0,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Measure tasks of the lm-evaluation-harness instead: names separated by commas, "
            "or paper for those of the paper."
        ),
    ] = None,
    few_shot: Annotated[
        int | None, typer.Option(help="Examples in each prompt; default the paper's or the task's.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first documents of each task, for a quick look.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with tasks of your own (YAML).")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Requests of a task in a batch.")] = 1,
    card: Annotated[
        bool, typer.Option("--card", help="Write the results into the model's folder and card.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help=f"{', '.join(DTYPES)}; default the checkpoint's precision.")
    ] = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity, or tasks, dense beside carved; the router beside oracle and chance."""
    with reporting(debug):
        shared: dict[str, Any] = {
            "baseline": baseline,
            "card": card,
            "dtype": dtype,
            "device": device,
            "trust_remote_code": trust_remote_code,
        }
        result: Evaluation | TaskEvaluation
        if tasks is None:
            _refuse(context, TASK_OPTIONS, "is for tasks: name some with --tasks.")
            result = evaluate(
                model,
                text=text,
                sequence_length=sequence_length,
                windows=windows,
                router=router,
                seed=seed,
                **shared,
            )
            table = partial(_perplexity_table, model, result)
        else:
            _refuse(context, PERPLEXITY_OPTIONS, "is for perplexity: leave it or --tasks out.")
            result = evaluate_tasks(
                model,
                tasks=tasks.split(","),
                few_shot=few_shot,
                limit=limit,
                include_path=include_path,
                batch_size=batch_size,
                **shared,
            )
            table = partial(_task_table, model, result)
    print_result(result, as_json, table)


def _refuse(context: typer.Context, names: Sequence[str], reason: str) -> None:
    """Raises `RequestError` if one of these options was given."""
    for name in names:
        if is_given(context, name):
            raise RequestError(f"--{name.replace('_', '-')} {reason}")


def _perplexity_table(model: str, result: Evaluation) -> Table:
    rows = {"perplexity": f"{result.perplexity:.3f}"}
    if result.baseline_perplexity is not None:
        rows["perplexity of the baseline"] = f"{result.baseline_perplexity:.3f}"
    rows["predicted tokens"] = f"{result.tokens:,} in windows of {result.sequence_length}"
    rows["router picks the oracle's experts"] = agreement_in_words(
        result.router_oracle_agreement, result.router_chance_agreement
    )
    return table_of(model, rows)


def _task_table(model: str, result: TaskEvaluation) -> Table:
    limited = f"only the first {result.limit} documents of each task" if result.limit else None
    table = Table(
        "task",
        *("metric", "few-shot", "documents", "model", "baseline"),
        title=model,
        title_justify="left",
        caption=limited,
    )
    for row in result.tasks:
        table.add_row(
            row.task,
            row.metric,
            "" if row.few_shot is None else str(row.few_shot),
            f"{row.documents:,}",
            _with_error(row.value, row.stderr),
            _with_error(row.baseline_value, row.baseline_stderr),
        )
    return table


def _with_error(value: float | None, stderr: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


def benchmark_command(
    model: Annotated[str | None, typer.Argument(help="Folder or Hub id of a carved model.")] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="The dense model; default one of the same shape with random weights."),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help=f"Random weights instead of MODEL: {', '.join(SHAPES)}.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of that shape; default all.")] = None,
    shared: Shared = 3,
    active: Active = 3,
    experts: Experts = 8,
    tokens: Annotated[
        str, typer.Option(help="Tokens for the FFN block, separated by commas.")
    ] = "1,8,64,512",
    prefill: Annotated[str, typer.Option(help="Tokens of a prompt.")] = "512",
    batch: Annotated[str, typer.Option(help="Sequences to decode.")] = "1,8",
    context: Annotated[int, typer.Option(help="Tokens in front of a decoding step.")] = 128,
    rounds: Annotated[int, typer.Option(help="Runs of each point, dense and carved in turn.")] = 7,
    text: Annotated[
        str | None, typer.Option(help="Text to run on, as in evaluate; default random tokens.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Experts backend, for example eager, grouped_mm.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Decode compiled, with a static cache.")
    ] = False,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw it into this PNG, SVG or PDF file.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"{', '.join(DTYPES)}; default the carved model's.")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="transformers, or llama.cpp: MODEL and --baseline may be GGUF files then, and "
            "only --prefill, --context and --rounds count."
        ),
    ] = "transformers",
    threads: Annotated[int, typer.Option(help="Of llama.cpp.")] = 1,
    type: Annotated[
        str, typer.Option(help="Of the GGUF files that are written for llama.cpp.")
    ] = "q8_0",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time FFN, prefill and decoding, dense and carved in turn, beside what is possible."""
    if engine != "transformers":
        with reporting(debug):
            sizes = {"prefill": _sizes("--prefill", prefill), "context": [context]}
            timed = _in_llama_cpp(engine, model, baseline, type, sizes, threads, rounds)
        print_result(timed, as_json, lambda: _engine_table(timed))
        return
    with reporting(debug):
        if plot_file is not None:
            check_plot(plot_file)
        result = benchmark(
            model,
            baseline=baseline,
            shape=shape,
            layers=layers,
            shared=shared,
            active=active,
            experts=experts,
            tokens=_sizes("--tokens", tokens),
            prefill=_sizes("--prefill", prefill),
            batch=_sizes("--batch", batch),
            context=context,
            rounds=rounds,
            text=text,
            backend=backend,
            compiled=compiled,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        if plot_file is not None:
            plot(result, plot_file)
    print_result(result, as_json, lambda: _benchmark_table(result))
    if not as_json:
        for remark in result.remarks:
            Console().print(remark, markup=False, highlight=False)


def _sizes(option: str, text: str) -> list[int]:
    """Numbers separated by commas; none for an empty text."""
    try:
        return [int(size) for size in text.split(",") if size.strip()]
    except ValueError as error:
        raise RequestError(f"{option} {text} is not a list of numbers such as 1,8,64.") from error


def _benchmark_table(result: Benchmark) -> Table:
    table = Table(
        "",
        *("dense ms", "carved ms", "speed", "runs", "roofline"),
        title=f"{result.model} {result.notation}: speed of carved relative to dense",
        title_justify="left",
        caption=f"{result.device}, {result.threads} threads, {result.dtype}: "
        f"{result.bandwidth_gb_per_s:.3g} GB/s, {result.arithmetic_gflop_per_s:.3g} GFLOP/s",
    )
    for name, label in LABELS.items():
        for point in getattr(result, name):
            size = f"batch {point.batch}" if name == "decode" else f"{point.tokens} tokens"
            _add_speed(table, f"{label}, {size}", point)
    return table


def _add_speed(table: Table, label: str, point: Point | EnginePoint) -> None:
    table.add_row(
        label,
        f"{point.dense_ms:.3g}",
        f"{point.carved_ms:.3g}",
        f"{point.speedup:.2f}",
        f"{point.speedup_low:.2f}-{point.speedup_high:.2f}",
        f"{point.roofline_speedup:.2f}",
        style="red" if point.speedup < 1 else None,
    )


def _in_llama_cpp(
    engine: str,
    model: str | None,
    baseline: str | None,
    type: str,
    sizes: dict[str, list[int]],
    threads: int,
    rounds: int,
) -> EngineBenchmark:
    if engine != "llama.cpp":
        raise RequestError(f"there is no engine {engine!r}; choose transformers or llama.cpp.")
    if model is None or baseline is None:
        raise RequestError("llama.cpp needs MODEL and --baseline: folders, or GGUF files.")
    with tempfile.TemporaryDirectory(prefix="cmoe-") as folder:
        files: list[str] = []
        for name, given in (("carved", model), ("dense", baseline)):
            made = Path(folder) / f"{name}.gguf"
            is_file = given.endswith(".gguf")
            files.append(given if is_file else export_gguf(given, made, type=type).output)
        carved, dense = files
        return benchmark_gguf(
            carved,
            dense,
            threads=threads,
            prefill=sizes["prefill"],
            context=sizes["context"],
            rounds=rounds,
        )


def _engine_table(result: EngineBenchmark) -> Table:
    table = Table(
        "",
        *("dense ms", "carved ms", "speed", "runs", "roofline"),
        title="speed of carved relative to dense",
        title_justify="left",
        caption=f"{result.engine}, {result.device}, {result.threads} threads",
    )
    labels = {"prefill": "prompt of {} tokens", "decode": "one token behind {}"}
    for name, label in labels.items():
        for point in getattr(result, name):
            _add_speed(table, label.format(point.tokens), point)
    return table
