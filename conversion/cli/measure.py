# SPDX-License-Identifier: Apache-2.0
"""The commands that measure models, and draw what they measure."""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..errors import RequestError
from ..measure.benchmark import BenchmarkOptions, benchmark
from ..measure.engine import GGUFBenchmarkOptions, benchmark_gguf
from ..measure.evaluate import EvaluateOptions, evaluate
from ..measure.tasks import TaskEvaluation, TaskOptions, evaluate_tasks
from ..measure.timing import LABELS, Comparison
from ..share.gguf_file import export_gguf
from ..show.figures import check_plot
from ..show.figures import plot as draw
from ..show.report import ReportOptions, report
from ..show.sweep import SPEEDS, SweepOptions, sweep
from .command import check_only, command
from .printing import Printed, agreement, facts, table


@command("evaluate", EvaluateOptions, TaskOptions)
def evaluate_command(model: str, **given: Any) -> Printed:
    """Measure tasks if some are named, or else perplexity."""
    if "tasks" in given:
        check_only(given, TaskOptions, "is for perplexity: leave it or --tasks out.")
        measured = evaluate_tasks(model, **given)
        return Printed(measured, [_task_table(model, measured)])
    check_only(given, EvaluateOptions, "is for tasks: name some with --tasks.")
    result = evaluate(model, **given)
    rows = {"perplexity": f"{result.perplexity:.3f}"}
    if result.baseline_perplexity is not None:
        rows["perplexity of the baseline"] = f"{result.baseline_perplexity:.3f}"
    rows["predicted tokens"] = f"{result.tokens:,} in windows of {result.sequence_length}"
    rows["router picks the oracle's experts"] = agreement(
        result.router_oracle_agreement, result.router_chance_agreement
    )
    return Printed(result, [facts(model, rows)])


def _task_table(model: str, result: TaskEvaluation) -> Table:
    limited = f"only the first {result.limit} documents of each task" if result.limit else None
    columns = ("task", "metric", "few-shot", "documents", "model", "baseline")
    made = table(model, *columns, caption=limited)
    for row in result.tasks:
        made.add_row(
            row.task,
            row.metric,
            "" if row.few_shot is None else str(row.few_shot),
            f"{row.documents:,}",
            _with_error(row.value, row.stderr),
            _with_error(row.baseline_value, row.baseline_stderr),
        )
    return made


def _with_error(value: float | None, stderr: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


@dataclass(frozen=True, kw_only=True)
class InTransformers(BenchmarkOptions):
    """The options of a benchmark in transformers."""

    plot: str | None = None
    """Draw it into this PNG, SVG or PDF file."""


@dataclass(frozen=True, kw_only=True)
class InLlamaCpp(GGUFBenchmarkOptions):
    """The options of a benchmark in llama.cpp."""

    type: str = "q8_0"
    """Of the GGUF files that are written for llama.cpp."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Where to measure."""

    engine: str = "transformers"
    """transformers, or llama.cpp: MODEL and --baseline may be GGUF files then, and only --prefill,
    --context, --rounds, --threads and --type go with it."""


@command("benchmark", BenchmarkOptions, InTransformers, InLlamaCpp, Engine)
def benchmark_command(engine: str = Engine.engine, **given: Any) -> Printed:
    """Measure in one of the engines."""
    if engine == "llama.cpp":
        check_only(given, InLlamaCpp, "does not go with --engine llama.cpp.")
        return _in_llama_cpp(**given)
    if engine != Engine.engine:
        raise RequestError(f"there is no engine {engine!r}; choose transformers or llama.cpp.")
    check_only(given, InTransformers, "goes with --engine llama.cpp only.")
    file = given.pop("plot", None)
    if file is not None:
        check_plot(Path(file))
    result = benchmark(**given)
    if file is not None:
        draw(result, Path(file))
    points = [
        (f"{label}, batch {it.batch}" if name == "decode" else f"{label}, {it.tokens} tokens", it)
        for name, label in LABELS.items()
        for it in getattr(result, name)
    ]
    made = _speeds(
        f"{result.model} {result.notation}: ",
        f"{result.device}, {result.threads} threads, {result.dtype}: "
        f"{result.bandwidth_gb_per_s:.3g} GB/s, {result.arithmetic_gflop_per_s:.3g} GFLOP/s",
        points,
    )
    backends = dict.fromkeys(it.backend for _, it in points)
    ran = [
        f"{name} ({', '.join(it for it, p in points if p.backend == name)})" for name in backends
    ]
    return Printed(result, [made, f"How the experts ran: {'; '.join(ran)}.", *result.remarks])


def _in_llama_cpp(
    model: str | None = None,
    baseline: str | None = None,
    type: str = InLlamaCpp.type,
    context: int | None = None,
    **given: Any,
) -> Printed:
    if model is None or baseline is None:
        raise RequestError("llama.cpp needs MODEL and --baseline: folders, or GGUF files.")
    if context is not None:
        given["context"] = [context]
    with tempfile.TemporaryDirectory(prefix="cmoe-") as folder:
        files = {"carved": model, "dense": baseline}
        for name, file in files.items():
            if not file.endswith(".gguf"):
                files[name] = export_gguf(file, f"{folder}/{name}.gguf", type=type).output
        result = benchmark_gguf(files["carved"], files["dense"], **given)
    caption = f"{result.engine}, {result.device}, {result.threads} threads"
    points = [(f"prompt of {it.tokens} tokens", it) for it in result.prefill]
    points += [(f"one token behind {it.tokens}", it) for it in result.decode]
    return Printed(result, [_speeds("", caption, points)])


def _speeds(of: str, caption: str, points: Iterable[tuple[str, Comparison]]) -> Table:
    columns = ("", "dense ms", "carved ms", "speed", "runs", "roofline")
    made = table(f"{of}speed of carved relative to dense", *columns, caption=caption)
    for label, point in points:
        made.add_row(
            label,
            f"{point.dense_ms:.3g}",
            f"{point.carved_ms:.3g}",
            f"{point.speedup:.2f}",
            f"{point.speedup_low:.2f}-{point.speedup_high:.2f}",
            f"{point.roofline_speedup:.2f}",
            style="red" if point.speedup < 1 else None,
        )
    return made


@command("sweep", SweepOptions)
def sweep_command(**given: Any) -> Printed:
    """Measure a grid."""
    result = sweep(**given)
    title = f"{result.model}, dense: {result.dense_perplexity:.2f}; speed relative to dense"
    made = table(title, "", "runs", "perplexity", *SPEEDS.values(), caption=result.device)
    for row in result.rows:
        made.add_row(
            row.label,
            f"{row.activation_ratio:.1%}",
            f"{row.perplexity:.2f}",
            *(f"{row.speedup[name]:.2f}" if row.speedup else "" for name in SPEEDS),
        )
    return Printed(result, [made, f"table, JSON and plot: {result.output}"])


@command("report", ReportOptions)
def report_command(model: str, **given: Any) -> Printed:
    """Write a page."""
    result = report(model, **given)
    rows = {
        "page": result.output,
        "figures beside it": f"{len(result.figures)} PNG files",
        "perplexity": f"{result.perplexity:.3f} on {result.tokens:,} tokens",
    }
    return Printed(result, [facts(model, rows)])
