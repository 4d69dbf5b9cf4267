# SPDX-License-Identifier: Apache-2.0
"""The command line: thin commands over the verbs.

With `--json` a command prints exactly one JSON object on standard output. Everything else goes
to standard error. Exit status: 0 done, 1 the work failed, 2 the request was wrong.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import huggingface_hub.utils
import typer
import yaml
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from .benchmark import LABELS, Benchmark, benchmark, check_plot, plot
from .convert import convert, resume
from .demo import demo
from .device import DTYPES
from .errors import CMoEError, RequestError
from .evaluate import ROUTERS, evaluate
from .plan import Plan, plan
from .recipe import RECIPES
from .settings import Options, absolute
from .shapes import SHAPES

app = typer.Typer(
    name="cmoe",
    help="Turn a dense language model into a sparse Mixture of Experts, without training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing model at OUT.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default the fastest.")]
Shared = Annotated[int, typer.Option(help="Shared experts, always on (S).")]
Active = Annotated[int, typer.Option(help="Routed experts run per token (A).")]
Experts = Annotated[int, typer.Option(help="Experts in all (E); must divide the FFN width.")]
Recipe = Annotated[str, typer.Option(help=f"Method: {', '.join(RECIPES)}.")]
Change = Annotated[
    list[str] | None,
    typer.Option(help="Change one choice of the recipe, KEY=VALUE; repeatable. For ablations."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with a model.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the file's entries as defaults of the options that the command line leaves open."""
    if path is None:
        return None
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"cannot read {path}: {error}") from error
    if not isinstance(entries, dict):
        raise typer.BadParameter(f"{path} must map option names to values.")
    entries = {str(key).replace("-", "_"): value for key, value in entries.items()}
    known = {parameter.name for parameter in context.command.params}
    unknown = sorted(entries.keys() - known)
    if unknown:
        raise typer.BadParameter(f"{path} has unknown options: {', '.join(unknown)}.")
    context.default_map = {**(context.default_map or {}), **entries}
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=_read_config,
        help="YAML or JSON file with options; the command line wins.",
    ),
]


def _changes(pairs: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` pairs as a dictionary; values are read as YAML."""
    split = [pair.partition("=") for pair in pairs]
    for pair, (_, equals, _) in zip(pairs, split, strict=True):
        if not equals:
            raise RequestError(f"--change {pair} is not of the form KEY=VALUE.")
    return {key.replace("-", "_"): yaml.safe_load(value) for key, _, value in split}


@contextmanager
def _reporting(debug: bool) -> Iterator[None]:
    """Turn any failure into one line on standard error and an exit status."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        status = 1
        if isinstance(error, CMoEError):
            message, status = f"error: {' '.join(str(error).split())}", error.exit_status
        elif isinstance(error, KeyboardInterrupt):
            message = "interrupted: the output folder was not made."
        else:
            reason = " ".join(str(error).split())
            message = f"unexpected {type(error).__name__}: {reason} (--debug shows where)"
        message = " ".join([message, *getattr(error, "__notes__", [])])
        typer.echo(message, err=True)
        raise typer.Exit(status) from None


def _print(result: Any, as_json: bool, table: Callable[[], Table]) -> None:
    if as_json:
        print(json.dumps(asdict(result), allow_nan=False))
    else:
        Console().print(table())


def _table(title: str, rows: Mapping[str, str]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _agreement(own: float | None, chance: float | None) -> str:
    return "does not route" if own is None else f"{own:.1%} of tokens (chance {chance:.1%})"


@app.command("demo")
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
    with _reporting(debug):
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
            _agreement(result.router_oracle_agreement, result.router_chance_agreement),
        )
        table.caption = f"carved model: {result.output}" if result.output else None
        return table

    _print(result, as_json, table)
    if not as_json:
        Console().print(f"generated: {result.generated}", markup=False, highlight=False)


@app.command("convert")
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
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens per window; default 2,048 or the model's context.")
    ] = None,
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
    with _reporting(debug):
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
            _print(planned, as_json, lambda: _plan_table(model, planned))
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
    _print(result, as_json, lambda: _table(f"carved to {result.notation}", rows))


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
        given["calibration"] = absolute(str(given["calibration"]))
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
    return _table(f"{model} to {planned.notation}: nothing was written", rows)


@app.command("evaluate")
def evaluate_command(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a carved or dense model.")],
    baseline: Annotated[
        str | None, typer.Option(help="The dense model, measured in the same run.")
    ] = None,
    text: Annotated[
        str, typer.Option(help="Text file, wikitext2, c4 or a Hub data set.")
    ] = "wikitext2",
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens per window; default 2,048 or the model's context.")
    ] = None,
    router: Annotated[
        str, typer.Option(help=f"Who routes: {', '.join(ROUTERS)}; own is the model's router.")
    ] = "own",
    seed: Annotated[int, typer.Option(help="Seed of the random router.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help=f"{', '.join(DTYPES)}; default the checkpoint's precision.")
    ] = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity, dense beside carved, and the router beside an oracle and chance."""
    with _reporting(debug):
        result = evaluate(
            model,
            baseline=baseline,
            text=text,
            sequence_length=sequence_length,
            router=router,
            seed=seed,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
    rows = {"perplexity": f"{result.perplexity:.3f}"}
    if result.baseline_perplexity is not None:
        rows["perplexity of the baseline"] = f"{result.baseline_perplexity:.3f}"
    rows["predicted tokens"] = f"{result.tokens:,} in windows of {result.sequence_length}"
    rows["router picks the oracle's experts"] = _agreement(
        result.router_oracle_agreement, result.router_chance_agreement
    )
    _print(result, as_json, lambda: _table(model, rows))


@app.command("benchmark")
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
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time FFN, prefill and decoding, dense and carved in turn, beside what is possible."""
    with _reporting(debug):
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
    _print(result, as_json, lambda: _benchmark_table(result))
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
            table.add_row(
                f"{label}, {size}",
                f"{point.dense_ms:.3g}",
                f"{point.carved_ms:.3g}",
                f"{point.speedup:.2f}",
                f"{point.speedup_low:.2f}-{point.speedup_high:.2f}",
                f"{point.roofline_speedup:.2f}",
                style="red" if point.speedup < 1 else None,
            )
    return table


def main() -> None:
    """Entry point of the console command `cmoe`."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
        huggingface_hub.utils.disable_progress_bars()
    app()


if __name__ == "__main__":
    main()
