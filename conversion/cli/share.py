# SPDX-License-Identifier: Apache-2.0
"""The commands that bring models elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from ..export import ARCHITECTURES, export
from .common import Debug, Json, Overwrite, print_result, reporting, table_of


def export_command(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a carved model.")],
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    architecture: Annotated[
        str, typer.Option(help=f"Stock architecture: {', '.join(ARCHITECTURES)}.")
    ] = ARCHITECTURES[0],
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the same function as a stock architecture, which needs no remote code."""
    with reporting(debug):
        result = export(model, out, architecture=architecture, overwrite=overwrite)
    rows = {
        "output": result.output,
        "largest difference of the logits": f"{result.max_abs_logit_difference:.2g} "
        f"in {result.dtype}",
        "tokens routed alike": f"{result.routing_agreement:.2%}",
    }
    print_result(result, as_json, lambda: table_of(f"exported to {result.architecture}", rows))
