# SPDX-License-Identifier: Apache-2.0
"""The commands that bring models elsewhere."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..carve.settings import MAX_SHARD_SIZE
from ..errors import RequestError
from ..share.export import export
from ..share.gguf_file import FILE_TYPES, GGUFFile, export_gguf
from ..share.gguf_layouts import LAYOUTS
from ..share.publish import publish
from ..share.serve import ENGINES, serve
from ..share.targets import TARGETS
from ..share.upgrade import upgrade
from ..share.verify import verify
from .common import (
    Debug,
    Json,
    MaxShardSize,
    Overwrite,
    SequenceLength,
    TrustRemoteCode,
    print_result,
    reporting,
    table_of,
)


def export_command(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a carved model.")],
    out: Annotated[Path | None, typer.Argument(help="Folder to create.")] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(help="GGUF file to write for llama.cpp, instead; dense models too."),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(TARGETS)}; with --gguf {', '.join(LAYOUTS)}. Default the most "
            "faithful that fits."
        ),
    ] = None,
    type: Annotated[
        str, typer.Option(help=f"Of a GGUF file's matrices: {', '.join(FILE_TYPES)}.")
    ] = "f16",
    refit_router: Annotated[
        str | None,
        typer.Option(help="Text to fit linear routers to, where the model has others."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of that text.")] = 8,
    sequence_length: SequenceLength = None,
    max_shard_size: MaxShardSize = MAX_SHARD_SIZE,
    overwrite: Overwrite = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write a GGUF file that llama.cpp reads otherwise.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the same function as a stock architecture, which needs no remote code."""
    with reporting(debug):
        if (out is None) == (gguf is None):
            raise RequestError("give either a folder OUT or --gguf FILE.")
        if gguf is not None:
            file = export_gguf(
                model,
                gguf,
                type=type,
                to=to,
                refit_router=refit_router,
                samples=samples,
                sequence_length=sequence_length,
                overwrite=overwrite,
                force=force,
            )
            print_result(file, as_json, lambda: gguf_table(file))
            return
        assert out is not None
        result = export(
            model,
            out,
            to=to,
            refit_router=refit_router,
            samples=samples,
            sequence_length=sequence_length,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )
    rows = {
        "output": result.output,
        "chosen because": result.reason,
        "largest difference of the logits": f"{result.max_abs_logit_difference:.2g} "
        f"in {result.dtype}",
        "tokens routed alike": f"{result.routing_agreement:.2%}",
        "routers": "refitted" if result.refitted_router else "the same",
    }
    print_result(result, as_json, lambda: table_of(f"exported to {result.architecture}", rows))


def gguf_table(result: GGUFFile) -> Table:
    """What was written, for people."""
    rows = {
        "output": f"{result.output}, {result.bytes / 1e6:,.1f} MB",
        "chosen because": result.reason,
        "numbers": result.type,
    }
    if result.coarse:
        rows["float16 instead"] = f"{result.coarse} matrices whose rows q8_0 does not divide"
    return table_of(f"exported to llama.cpp's {result.architecture}", rows)


def publish_command(
    out: Annotated[Path, typer.Argument(help="Folder of a carved, recovered or exported model.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub.")],
    public: Annotated[
        bool, typer.Option("--public", help="Create the repository public, not private.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to upload to, or refs/pr/N; default main.")
    ] = None,
    pull_request: Annotated[
        bool, typer.Option("--pr", help="Open a draft pull request instead.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Delete files of another model in the repository.")
    ] = False,
    licence: Annotated[
        str | None, typer.Option("--license", help="Licence for the card, for example llama2.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the dense model, for the card.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, send nothing.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Upload a model to the Hub, checked before and compared afterwards."""
    with reporting(debug):
        result = publish(
            out,
            repository,
            public=public,
            revision=revision,
            pull_request=pull_request,
            replace=replace,
            licence=licence,
            base_model=base_model,
            dry_run=dry_run,
            trust_remote_code=trust_remote_code,
        )
    rows = {
        "repository": f"{result.url} ({'private' if result.private else 'public'})",
        "files": f"{result.files}, {result.bytes / 1e6:,.1f} MB",
        "commit": result.commit or "none: a dry run",
        "replaced": ", ".join(result.replaced) or "nothing",
        "deleted": ", ".join(result.deleted) or "nothing",
        "left alone": ", ".join(result.left) or "nothing",
    }
    title = "would be published" if result.dry_run else "published, sizes and hashes as here"
    print_result(result, as_json, lambda: table_of(title, rows))


def verify_command(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a carved or exported model.")],
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Does a model still compute what it did when it was made? Status 1 if not."""
    with reporting(debug):
        result = verify(model, trust_remote_code=trust_remote_code)
    print_result(result, as_json, lambda: result.line)
    if not result.as_carved:
        raise typer.Exit(1)


def upgrade_command(
    model: Annotated[
        str, typer.Argument(help="Folder of a carved model; a Hub id opens a pull request.")
    ],
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Put the code of this release into a model that an older one has carved; weights stay."""
    with reporting(debug):
        result = upgrade(model, trust_remote_code=trust_remote_code)
    rows = {
        "output": result.output,
        "renewed": ", ".join(result.changed) or "nothing: it was up to date",
        "weights": f"{len(result.weights)} files, unchanged",
        "verified": result.verification,
    }
    print_result(result, as_json, lambda: table_of(f"upgraded {model}", rows))


def serve_command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or Hub id; clients name it like this.")],
    engine: Annotated[
        str, typer.Option(help=f"{' or '.join(ENGINES)}; the second takes GGUF files too.")
    ] = ENGINES[0],
    debug: Debug = False,
) -> None:
    """Serve a model by the OpenAI protocol: `transformers serve` or `llama-server`."""
    with reporting(debug):
        serve(model, context.args, engine=engine)
