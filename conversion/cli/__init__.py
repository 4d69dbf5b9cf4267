# SPDX-License-Identifier: Apache-2.0
"""The command line: a command for each public function, made of its dataclass of options.

With `--json` a command prints exactly one JSON object on standard output. Everything else goes
to standard error. Exit status: 0 done, 1 the work failed, 2 the request was wrong.
"""

import logging
import sys
import warnings

import huggingface_hub.utils
from transformers.utils import logging as transformers_logging

from . import make, measure, share
from .command import app

__all__ = ["app", "main", "make", "measure", "share"]


def main() -> None:
    """Run the command line."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    transformers_logging.set_verbosity_error()
    # Libraries warn each other of what they will remove; the user can do nothing about it.
    warnings.simplefilter("ignore", FutureWarning)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
        huggingface_hub.utils.disable_progress_bars()
    app()
