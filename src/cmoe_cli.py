# SPDX-License-Identifier: Apache-2.0
"""The console command `cmoe`: says what there is at once, and leaves all else to the package.

It lies beside the package because importing anything inside imports torch and transformers.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from typing import Annotated

import typer

SUMMARIES = {
    "demo": "Carve the embedded default, compare dense and carved, generate a line of text.",
    "convert": "Carve MODEL into a CMoE repository at OUT, or go on with it: "
    "cmoe convert OUT --resume.",
    "recover": "Train a carved MODEL to do as the dense one does, into OUT, or go on: "
    "cmoe recover OUT --resume.",
    "evaluate": "Measure perplexity, or tasks, dense beside carved; the router beside oracle and "
    "chance.",
    "benchmark": "Time FFN, prefill and decoding, dense and carved in turn, beside what is "
    "possible.",
    "sweep": "Quality and speed over shapes and budgets. Interrupted, the same command goes on.",
    "report": "Draw what happens inside a carved model: one HTML page that works offline.",
    "export": "Write the same function as a stock architecture, which needs no remote code.",
    "verify": "Does a model still compute what it did when it was made? Status 1 if not.",
    "upgrade": "Put the code of this release into a model that an older one has carved; weights "
    "stay.",
    "publish": "Upload a model to the Hub, checked before and compared afterwards.",
    "serve": "Serve a model by the OpenAI protocol: `transformers serve` or `llama-server`.",
}
"""What the help says of each command."""


def application() -> typer.Typer:
    """Return `cmoe` without commands."""
    app = typer.Typer(
        name="cmoe",
        help="Turn a dense language model into a sparse Mixture of Experts, without training.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(before_all)
    return app


def say_version(wanted: bool) -> None:
    """Print the version and stop, if asked to."""
    if wanted:
        print(f"cmoe-hf {version('cmoe-hf')}")
        raise typer.Exit


def before_all(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=say_version, help="Say the version, and stop."
        ),
    ] = False,
) -> None:
    """Handle the options before any command."""


def overview() -> typer.Typer:
    """Return `cmoe` with commands that have a summary and nothing else."""
    app = application()
    for name, summary in SUMMARIES.items():
        app.command(name, help=summary)(lambda: None)
    return app


def main() -> None:
    """Entry point of the console command."""
    if sys.argv[1:] in ([], ["--help"], ["--version"]):
        overview()()
    import_module("cmoe_hf.conversion.cli").main()
