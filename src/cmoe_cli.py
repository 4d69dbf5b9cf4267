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
    "demo": "Carve and recover a small model that comes with the package, and compare.",
    "convert": "Convert a dense MODEL to a CMoE repository at OUT, or resume: "
    "cmoe convert OUT --resume.",
    "recover": "Recover quality of a carved MODEL by distillation, into OUT, or resume: "
    "cmoe recover OUT --resume.",
    "evaluate": "Measure perplexity or tasks, beside the dense model, and the router beside "
    "oracle and chance.",
    "benchmark": "Time FFN, prefill and decoding, dense and carved in turn, beside the roofline.",
    "sweep": "Measure quality and speed of several shapes and budgets.",
    "report": "Write an HTML page about a carved model: quality, routing, neurons, speed.",
    "export": "Write the same function as a stock architecture, or as a GGUF file.",
    "verify": "Check that a model computes the same as when it was written; exit status 1 if not.",
    "upgrade": "Replace the code of a model carved by an older release; weights stay.",
    "publish": "Upload a model to the Hub, with checks before and after.",
    "serve": "Serve a model with `transformers serve` or `llama-server` (OpenAI protocol).",
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
