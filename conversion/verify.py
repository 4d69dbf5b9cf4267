# SPDX-License-Identifier: Apache-2.0
"""The verb `verify`: does a repository still compute what it did when it was made.

Every repository carries a fingerprint of itself in `conversion.json`, see `probe`. It is computed
again under whatever is installed, and generation with a cache and in a padded batch is compared
with the plain forward pass.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers import AutoConfig, PreTrainedTokenizerBase

from . import probe
from .checkpoint import fetch_model, find_model, load_tokenizer, read_json
from .device import versions
from .errors import CMoEError, RequestError
from .partial import PartialFolder, sha256_of
from .selection import code_of_type

CONVERSION = "conversion.json"
RELEASED = Path(__file__).parent / "assets" / "released.json"
"""SHA-256 and name of each Python file that a release has put into repositories: they are ours."""
PROMPTS = (
    "A model that is carved goes on with a sentence as it did on the day it was made, and so",
    "Left of this one there is padding:",
)
LONGEST_PROMPT = 48
TOLERANCE = 1e-3
"""Of log-probabilities in float32. A cache that is forgotten changes them by more than 1."""


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
        """The same in one line."""
        where = f"{self.model} under transformers {self.versions['transformers']}"
        if self.differences:
            return f"not as carved: {where}: {'; '.join(self.differences)}."
        if self.fingerprint:
            return f"as carved: {where}."
        return f"consistent: {where}; it has no fingerprint to tell whether it is as carved."


def verify(model: str | Path, *, trust_remote_code: bool = False) -> Verification:
    """Compare what a repository computes with its fingerprint, and its ways to generate.

    Its own code runs, in a process of its own, unless it is the code of this release.

    Args:
        model: Folder or Hub id of a carved, recovered or exported model.
        trust_remote_code: Run code that no release of this project has written.

    Raises:
        RequestError: There is no such model, or its code is not to be trusted.
        CMoEError: It cannot be loaded at all.
    """
    folder, name, commit = find_model(model)
    if commit is not None:
        folder = fetch_model(name, commit, code=True)
    stated = stated_fingerprint(folder)
    prompts = stated["prompts"] if stated else prompts_for(folder, load_tokenizer(folder))
    recorded = stated["generated"] if stated else None
    if runs_here(folder, trusted=trust_remote_code):
        found = computed(folder, name, prompts, recorded)
    else:
        found = computed_elsewhere(folder, name, prompts, recorded)
    differences = [*inconsistencies(found), *(changes(found, stated) if stated else [])]
    return Verification(
        model=name,
        as_carved=not differences,
        differences=differences,
        fingerprint=stated is not None,
        versions=versions(),
    )


def fingerprint_of(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The fingerprint of a repository that was written just now.

    Raises `CMoEError` if it generates something else with a cache or a batch than without.
    """
    prompts = prompts_for(folder, tokenizer)
    found = computed(folder, folder.name, prompts, None)
    if wrong := inconsistencies(found):
        raise CMoEError(
            f"the model that was written is not usable under transformers "
            f"{versions()['transformers']}: {'; '.join(wrong)}. If the source is sound, install a "
            "version that cmoe-hf has been tested with, and go on."
        )
    names = ("likeliest", "log_probabilities", "generated")
    return {"prompts": prompts, **{name: found[name] for name in names}}


def write_fingerprint(
    source: Path, work: PartialFolder, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The `conversion.json` of a folder made from a carved one: its record, another fingerprint."""
    record = read_json(source / CONVERSION) if (source / CONVERSION).is_file() else {}
    record["fingerprint"] = fingerprint_of(work.folder, tokenizer)
    work.write_json(CONVERSION, record)


def stated_fingerprint(folder: Path) -> dict[str, Any] | None:
    """What the folder says of itself; None for a repository of an older release."""
    if not (folder / CONVERSION).is_file():
        return None
    return read_json(folder / CONVERSION).get("fingerprint")


def prompts_for(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of two sentences of different lengths, within the model's context."""
    context = AutoConfig.from_pretrained(folder).max_position_embeddings
    longest = min(LONGEST_PROMPT, context - probe.GENERATED)
    ids = [tokenizer(prompt)["input_ids"][:longest] for prompt in PROMPTS]
    ids[1] = ids[1][: len(ids[0]) - 1]
    return ids


def runs_here(folder: Path, *, trusted: bool) -> bool:
    """Whether the code of a repository is that of this release, or it has none.

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


def computed(
    folder: Path, name: str, prompts: list[list[int]], recorded: list[int] | None
) -> dict[str, Any]:
    """What `probe` finds in this process. Raises `CMoEError` if the model cannot be loaded."""
    try:
        return probe.probe(folder, prompts, recorded=recorded)
    except Exception as error:  # the library raises whatever its readers raise
        raise unloadable(name, str(error)) from error


def computed_elsewhere(
    folder: Path, name: str, prompts: list[list[int]], recorded: list[int] | None
) -> dict[str, Any]:
    """What `probe` finds where this package is not imported: the repository's own code runs."""
    request = json.dumps({"prompts": prompts, "recorded": recorded})
    with tempfile.TemporaryDirectory() as temporary:
        result = Path(temporary) / "result.json"
        # Without -P the rooms of this package would be taken for modules of the standard library.
        done = subprocess.run(
            [sys.executable, "-P", probe.__file__, str(folder.resolve()), request, str(result)],
            env={**os.environ, "HF_MODULES_CACHE": temporary, "HF_HOME": constants.HF_HOME},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise unloadable(name, done.stderr)
        return json.loads(result.read_text(encoding="utf-8"))


def unloadable(name: str, reason: str) -> CMoEError:
    """That a model cannot be run at all, with the last line of the reason."""
    lines = [line for line in reason.strip().splitlines() if line.strip()] or ["no reason given"]
    return CMoEError(
        f"{name} cannot be run under transformers {versions()['transformers']}: {lines[-1]}"
    )


def inconsistencies(found: dict[str, Any]) -> list[str]:
    """Ways to generate that differ from the plain forward pass, in words."""
    differences = found["differences"]
    if not math.isfinite(differences["cached"]):
        return ["its logits are not finite numbers"]
    words = {
        "cached": "it generates something else with the cache than without",
        "padded": "a batch padded on the left gives something else than its sequences alone",
    }
    return [  # `not <=`: a NaN is no agreement either
        f"{told} (log-probabilities differ by {differences[name]:.2g})"
        for name, told in words.items()
        if not differences[name] <= TOLERANCE
    ]


def changes(found: dict[str, Any], stated: dict[str, Any]) -> list[str]:
    """What is not as the fingerprint says, in words."""
    pairs = zip(found["log_probabilities"], stated["log_probabilities"], strict=True)
    moved = [max(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in pairs]
    told = []
    if not sorted(moved)[len(moved) // 2] <= TOLERANCE:
        told.append(f"its likeliest tokens have other log-probabilities (by {max(moved):.2g})")
    recorded = found["differences"]["recorded"]
    if not recorded <= TOLERANCE:
        told.append(
            f"it no longer generates what it did (log-probabilities miss by {recorded:.2g})"
        )
    return told
