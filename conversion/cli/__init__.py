# SPDX-License-Identifier: Apache-2.0
"""The command line: thin commands over the verbs.

With `--json` a command prints exactly one JSON object on standard output. Everything else goes
to standard error. Exit status: 0 done, 1 the work failed, 2 the request was wrong.
"""

import logging
import sys
import warnings
from collections.abc import Callable

import huggingface_hub.utils
from transformers.utils import logging as transformers_logging

from cmoe_cli import application

from .make import convert_command, demo_command, recover_command
from .measure import benchmark_command, evaluate_command
from .share import (
    export_command,
    publish_command,
    serve_command,
    upgrade_command,
    verify_command,
)
from .show import report_command, sweep_command

app = application()
COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo_command,
    "convert": convert_command,
    "recover": recover_command,
    "evaluate": evaluate_command,
    "benchmark": benchmark_command,
    "sweep": sweep_command,
    "report": report_command,
    "export": export_command,
    "verify": verify_command,
    "upgrade": upgrade_command,
    "publish": publish_command,
    "serve": serve_command,
}
PASSES_OPTIONS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
for name, command in COMMANDS.items():
    settings = PASSES_OPTIONS_ON if command is serve_command else None
    app.command(name, context_settings=settings)(command)


def main() -> None:
    """Do what the command line says."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    transformers_logging.set_verbosity_error()
    # Libraries warn each other of what they will remove; the user can do nothing about it.
    warnings.simplefilter("ignore", FutureWarning)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
        huggingface_hub.utils.disable_progress_bars()
    app()
