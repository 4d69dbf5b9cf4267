# SPDX-License-Identifier: Apache-2.0
"""The commands that bring models elsewhere."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError
from ..share.export import ExportOptions, export
from ..share.gguf_file import GGUFOptions, export_gguf
from ..share.publish import PublishOptions, publish
from ..share.serve import ServeOptions, serve
from ..share.upgrade import UpgradeOptions, upgrade
from ..share.verify import VerifyOptions, verify
from .command import check_only, command
from .printing import Printed, facts


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is written."""

    gguf: str | None = None
    """GGUF file to write for llama.cpp, instead; dense models too."""


@command("export", Target, ExportOptions, GGUFOptions, optional=["output"])
def export_command(
    model: str, output: str | None = None, gguf: str | None = None, **given: Any
) -> Printed:
    """Write a folder or a GGUF file."""
    if gguf is not None:
        if output is not None:
            raise RequestError("give either a folder OUT or --gguf FILE.")
        check_only(given, GGUFOptions, "is for a folder: leave it or --gguf out.")
        file = export_gguf(model, gguf, **given)
        rows = {
            "output": f"{file.output}, {file.bytes / 1e6:,.1f} MB",
            "chosen because": file.reason,
            "numbers": file.type,
        }
        for type, count in Counter(file.fallbacks.values()).items():
            rows[f"{type} instead"] = f"{count} matrices whose rows its blocks do not divide"
        return Printed(file, [facts(f"exported to llama.cpp's {file.architecture}", rows)])
    if output is None:
        raise RequestError("give either a folder OUT or --gguf FILE.")
    check_only(given, ExportOptions, "is for a GGUF file: name one with --gguf.")
    result = export(model, output, **given)
    rows = {
        "output": result.output,
        "chosen because": result.reason,
        "largest difference of the logits": f"{result.max_abs_logit_difference:.2g} "
        f"in {result.dtype}",
        "tokens routed alike": f"{result.routing_agreement:.2%}",
    }
    return Printed(result, [facts(f"exported to {result.architecture}", rows)])


@command("verify", VerifyOptions)
def verify_command(**given: Any) -> Printed:
    """Verify a repository; exit with 1 if something differs."""
    result = verify(**given)
    return Printed(result, [result.line], status=0 if result.as_carved else 1)


@command("upgrade", UpgradeOptions)
def upgrade_command(model: str, **given: Any) -> Printed:
    """Upgrade a repository."""
    result = upgrade(model, **given)
    rows = {
        "output": result.output,
        "renewed": ", ".join(result.changed) or "nothing: it was up to date",
        "weights": f"{len(result.weights)} files, unchanged",
        "verified": result.verification,
    }
    return Printed(result, [facts(f"upgraded {model}", rows)])


@command("publish", PublishOptions)
def publish_command(**given: Any) -> Printed:
    """Publish a folder."""
    result = publish(**given)
    rows = {
        "repository": f"{result.url} ({'private' if result.private else 'public'})",
        "files": f"{result.files}, {result.bytes / 1e6:,.1f} MB",
        "commit": result.commit or "none: a dry run",
        "replaced": ", ".join(result.replaced) or "nothing",
        "deleted": ", ".join(result.deleted) or "nothing",
        "left alone": ", ".join(result.left) or "nothing",
    }
    title = "would be published" if result.dry_run else "published, sizes and hashes as here"
    return Printed(result, [facts(title, rows)])


@command("serve", ServeOptions, passes_on=True)
def serve_command(**given: Any) -> None:
    """Serve a model."""
    serve(**given)
