# SPDX-License-Identifier: Apache-2.0
"""Check that a repository still computes what it did when it was made.

The fingerprint in its `conversion.json` is computed again under whatever is installed, and
generation with a cache and in a padded batch is compared with the plain forward pass.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from ..device import versions
from ..errors import RequestError
from ..folder import outputs
from ..folder.fingerprint import (
    changes,
    computed,
    inconsistencies,
    prompts_for,
    stated_fingerprint,
    unloadable,
)
from ..folder.remote_code import RELEASED, code_of_type
from ..folder.unfinished import sha256_of
from ..options import with_options
from ..source.hub import load_tokenizer
from ..source.loading import model_folder
from ..source.stored import read_json


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was found; the keys of `cmoe verify --json`."""

    model: str
    as_carved: bool
    differences: list[str]
    """What is not as it should be, in words; empty if everything is."""
    fingerprint: bool
    """Whether the repository has one. Without, only its ways to generate were compared."""
    versions: dict[str, str]

    @property
    def line(self) -> str:
        """Return the outcome in one line."""
        where = f"{self.model} under transformers {self.versions['transformers']}"
        if self.differences:
            return f"not as carved: {where}: {'; '.join(self.differences)}."
        if self.fingerprint:
            return f"as carved: {where}."
        return f"consistent: {where}; it has no fingerprint to tell whether it is as carved."


@dataclass(frozen=True)
class VerifyOptions:
    """The options of `verify`."""

    model: str | Path
    """Folder or Hub id of a carved, recovered or exported model."""
    _: KW_ONLY
    trust_remote_code: bool = False
    """Run code of a model that no release of this project has written."""


@with_options(VerifyOptions)
def verify(options: VerifyOptions) -> Verification:
    """Compare what a repository computes with its fingerprint, and its ways to generate.

    Its own code runs, in a process of its own, unless it is the code of this release.

    Raises:
        RequestError: There is no such model, or its code is not to be trusted.
        CMoEError: It cannot be loaded at all.
    """
    trusted = options.trust_remote_code
    folder, name = model_folder(options.model, code=True)
    stated = stated_fingerprint(folder)
    compute = computed if runs_here(folder, trusted=trusted) else computed_elsewhere
    if stated:
        found = compute(folder, name, stated["prompts"], stated["generated"])
    else:
        tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
        found = compute(folder, name, prompts_for(folder, tokenizer), None)
    differences = [*inconsistencies(found), *(changes(found, stated) if stated else [])]
    return Verification(
        model=name,
        as_carved=not differences,
        differences=differences,
        fingerprint=stated is not None,
        versions=versions(),
    )


def runs_here(folder: Path, *, trusted: bool) -> bool:
    """Return whether a repository has the code of this release, or none.

    Raises `RequestError` for code that is neither ours nor trusted.
    """
    config = read_json(folder / "config.json")
    code = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.py"))}
    today = code_of_type(config.get("model_type"))
    if not code or {name: path.read_text("utf-8") for name, path in code.items()} == today:
        return True
    ours = read_json(RELEASED)
    foreign = [name for name, path in code.items() if ours.get(sha256_of(path)) != name]
    modules = {f"{entry.partition('.')[0]}.py" for entry in (config.get("auto_map") or {}).values()}
    foreign += sorted(modules - code.keys())
    if foreign and not trusted:
        raise RequestError(
            f"{', '.join(foreign)} of {folder.name} was not written by any release of cmoe-hf. "
            "Pass --trust-remote-code if you have read it and agree that it runs."
        )
    return False


def computed_elsewhere(
    folder: Path, name: str, prompts: list[list[int]], recorded: list[int] | None
) -> dict[str, Any]:
    """Compute a fingerprint by the repository's own code, in a process without this package."""
    request = json.dumps({"prompts": prompts, "recorded": recorded})
    with tempfile.TemporaryDirectory() as temporary:
        result = Path(temporary) / "result.json"
        # Without -P this folder's modules would shadow those of the standard library.
        done = subprocess.run(
            [sys.executable, "-P", outputs.__file__, str(folder.resolve()), request, str(result)],
            env={**os.environ, "HF_MODULES_CACHE": temporary, "HF_HOME": constants.HF_HOME},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise unloadable(name, done.stderr)
        return json.loads(result.read_text(encoding="utf-8"))
