# SPDX-License-Identifier: Apache-2.0
"""The commands that draw."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..carve.settings import Settings
from ..device import DTYPES
from ..show.report import report
from ..show.sweep import GRID, OPTIONS, SPEEDS, Sweep, sweep
from .common import (
    Debug,
    Device,
    Json,
    SequenceLength,
    TrustRemoteCode,
    print_result,
    reporting,
    table_of,
    with_options,
)


def report_command(
    model: Annotated[str, typer.Argument(help="Folder of a carved model.")],
    baseline: Annotated[
        str | None, typer.Option(help="The dense model: its perplexity, and the speed of both.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="Another carved model of the same source, side by side.")
    ] = None,
    text: Annotated[
        str, typer.Option(help="Text file, wikitext2, c4 or a Hub data set to watch it on.")
    ] = "wikitext2",
    sequence_length: SequenceLength = None,
    windows: Annotated[int, typer.Option(help="Windows of the text, from its beginning.")] = 16,
    rounds: Annotated[
        int, typer.Option(help="Timed runs, dense and carved in turn; 0 for none.")
    ] = 5,
    sample: Annotated[
        str | None, typer.Option(help="A sentence to follow through the experts.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the page; default report in the model's.")
    ] = None,
    figures: Annotated[bool, typer.Option(help="Draw PNG files beside the page.")] = True,
    card: Annotated[
        bool, typer.Option(help="Show two of the figures in the model's README.md.")
    ] = True,
    dtype: Annotated[
        str | None, typer.Option(help=f"{', '.join(DTYPES)}; default the checkpoint's precision.")
    ] = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw what happens inside a carved model: one HTML page that works offline."""
    with reporting(debug):
        result = report(
            model,
            baseline=baseline,
            compare=compare,
            text=text,
            sequence_length=sequence_length,
            windows=windows,
            rounds=rounds,
            sample=sample,
            output=output,
            figures=figures,
            card=card,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
    rows = {
        "page": result.output,
        "figures beside it": f"{len(result.figures)} PNG files",
        "perplexity": f"{result.perplexity:.3f} on {result.tokens:,} tokens",
    }
    print_result(result, as_json, lambda: table_of(model, rows))


@with_options(Settings, only=OPTIONS)
def sweep_command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a dense model.")],
    out: Annotated[
        Path | None, typer.Argument(help="Folder for the results; default MODEL's name + -sweep.")
    ] = None,
    *,
    grid: Annotated[
        str, typer.Option(help="Shapes and budgets (0.5), separated by commas; static is added.")
    ] = ",".join(GRID),
    options: dict[str, Any],
    text: Annotated[str, typer.Option(help="Text to measure perplexity on.")] = "wikitext2",
    rounds: Annotated[
        int, typer.Option(help="Timed runs of each point, dense and carved in turn; 0 for none.")
    ] = 7,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the carved models in OUT.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Forget what an earlier sweep in OUT measured.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Quality and speed over shapes and budgets. Interrupted, the same command goes on."""
    with reporting(debug):
        result = sweep(
            model,
            out,
            grid=[notation for notation in grid.split(",") if notation.strip()],
            text=text,
            rounds=rounds,
            keep=keep,
            overwrite=overwrite,
            **options,
        )
    print_result(result, as_json, lambda: _sweep_table(result))
    if not as_json:
        Console().print(f"table, JSON and plot: {result.output}", markup=False, highlight=False)


def _sweep_table(result: Sweep) -> Table:
    table = Table(
        *("", "runs", "perplexity", *SPEEDS.values()),
        title=f"{result.model}, dense: {result.dense_perplexity:.2f}; speed relative to dense",
        title_justify="left",
        caption=result.device,
    )
    for row in result.rows:
        table.add_row(
            row.label,
            f"{row.activation_ratio:.1%}",
            f"{row.perplexity:.2f}",
            *(f"{row.speedup[name]:.2f}" if row.speedup else "" for name in SPEEDS),
        )
    return table
