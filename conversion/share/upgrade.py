# SPDX-License-Identifier: Apache-2.0
"""Put the code of this release into a repository that an older one has carved.

The new folder is written beside the old one, shares its weights, and replaces it when verified.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import cmoe_hf
from cmoe_hf import CMoEConfig
from cmoe_hf.families import current_name

from ..errors import CMoEError, RequestError
from ..folder.auxiliary_files import read_card
from ..folder.card import CARD_FILE, renewed_card
from ..folder.fingerprint import (
    CONVERSION,
    conversion_record,
    fingerprint_of,
    moved,
    prompts_for,
    stated_fingerprint,
)
from ..folder.json_utils import as_json
from ..folder.paths import replace_file
from ..folder.remote_code import REMOTE_CODE
from ..folder.unfinished import SETTINGS, PartialFolder, sha256_of
from ..measure.routing import stored_always_on
from ..options import with_options
from ..source.hub import find_model, from_hub, load_tokenizer
from ..source.stored import WEIGHTS_INDEX, read_json
from .publish import publish
from .verify import VerifyOptions, computed_elsewhere, runs_here, verify

REWRITTEN = ("config.json", CONVERSION, CARD_FILE, *REMOTE_CODE)


@dataclass(frozen=True, kw_only=True)
class Upgrade:
    """What was done; the keys of `cmoe upgrade --json`."""

    output: str
    """The folder, or the address of the pull request."""
    changed: list[str]
    """Files that are others now; empty if the repository was up to date."""
    weights: dict[str, str]
    """SHA-256 of the weights' files, the same before and after."""
    verification: str
    """What `verify` says of the result, in one line."""


class UpgradeFolder(PartialFolder):
    """The unfinished folder of an upgrade."""

    noun = "upgrade"

    def _refuse_contents(self) -> None:
        begun = self.private / SETTINGS
        if begun.is_file() and read_json(begun).get("work") != self.noun:
            raise RequestError(
                f"{self.partial.name} beside the model holds unfinished work, which an upgrade "
                "would remove: complete it with --resume, or remove it."
            )
        super()._refuse_contents()


@dataclass(frozen=True)
class UpgradeOptions(VerifyOptions):
    """The options of `upgrade`."""

    model: str | Path
    """Folder of a carved or recovered model; a Hub id opens a pull request."""


@with_options(UpgradeOptions)
def upgrade(options: UpgradeOptions) -> Upgrade:
    """Upgrade the Python files, the configuration, the card and the fingerprint of a repository.

    Weights stay what they are, to the byte. A repository without a fingerprint is compared with
    what its old code computes without a cache, if that still runs.

    Raises:
        RequestError: It is no carved model.
        CMoEError: The result would compute something else; nothing was changed.
    """
    trusted = options.trust_remote_code
    output = Path(options.model).expanduser().absolute()
    replaced = UpgradeFolder(output).replaced
    if not output.exists() and replaced.is_dir():
        replaced.rename(output)  # an upgrade was killed between its last two steps
    folder, name, commit = find_model(options.model)
    if commit is None:
        return upgrade_folder(folder.resolve(), trusted)
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / name.rpartition("/")[2]
        from_hub(snapshot_download, name, commit, local_dir=copy)
        shutil.rmtree(copy / ".cache", ignore_errors=True)
        done = upgrade_folder(copy, trusted)
        if not done.changed:
            return replace(done, output=name)
        published = publish(copy, name, pull_request=True, trust_remote_code=trusted)
        return replace(done, output=published.url)


def upgrade_folder(folder: Path, trusted: bool) -> Upgrade:
    """Upgrade a local folder."""
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, CMoEConfig):
        raise RequestError(
            f"{folder.name} is a {config.model_type} model, not a carved one: it has no code of "
            "ours to renew."
        )
    UpgradeFolder(folder, overwrite=True).check({})
    old = None
    if not (stated_fingerprint(folder) or runs_here(folder, trusted=trusted)):
        with suppress(CMoEError):  # the upgrade mends what broke it
            prompts = prompts_for(folder, load_tokenizer(folder, trust_remote_code=trusted))
            old = computed_elsewhere(folder, folder.name, prompts, None)
    before = {path.name: sha256_of(path) for path in sorted(folder.glob("*.safetensors"))}
    with UpgradeFolder.create(folder, {}, overwrite=True) as work:
        share_files(folder, work.folder)
        renamed = rename_tensors(work.folder, config.model_type)
        config.always_on_experts = stored_always_on(folder, config)
        config.save_pretrained(work.folder)
        code = work.write_code(type(config))
        record = conversion_record(folder)
        if differ(folder, work.folder, REMOTE_CODE):
            record["upgraded_to"] = [*record.get("upgraded_to", []), cmoe_hf.__version__]
        if not record.get("fingerprint"):
            tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
            record["fingerprint"] = fingerprint_of(work.folder, tokenizer)
        work.write_json(CONVERSION, record)
        if (folder / CARD_FILE).is_file():
            work.write_files({CARD_FILE: renewed_card(read_card(folder), code)})
        found = replace(verify(work.folder, trust_remote_code=trusted), model=folder.name)
        differences = list(found.differences)
        if old is not None:  # the fingerprint is what the new code computed a moment ago
            differences += moved(old, record["fingerprint"])
        if differences:
            raise CMoEError(f"{folder.name} was not upgraded: {'; '.join(differences)}.")
        after = {name: sha256_of(work.folder / name) for name in before}
        if after != before and not renamed:
            raise CMoEError(f"the weights of {folder.name} changed on the disk meanwhile.")
        changed = differ(folder, work.folder, sorted(REWRITTEN))
    return Upgrade(output=str(folder), changed=changed, weights=after, verification=found.line)


def differ(old: Path, new: Path, names: Iterable[str]) -> list[str]:
    """Return the names of files that differ, or are only in one of the folders."""
    return [
        name
        for name in names
        if (old / name).is_file() != (new / name).is_file()
        or ((new / name).is_file() and (old / name).read_bytes() != (new / name).read_bytes())
    ]


def share_files(folder: Path, target: Path) -> None:
    """Link all files that are not written anew, or copy them where there can be no links."""
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if path.is_dir() and not path.is_symlink():
            (target / relative).mkdir(parents=True, exist_ok=True)
        elif relative.as_posix() not in REWRITTEN:
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            try:
                if path.is_symlink():  # in the Hub's cache a relative one
                    (target / relative).symlink_to(path.resolve())
                else:
                    os.link(path, target / relative)
            except (OSError, NotImplementedError):  # of Windows
                shutil.copy2(path, target / relative)


def rename_tensors(folder: Path, model_type: str) -> bool:
    """Give the tensors of an earlier release the names that today's code reads.

    Return whether there were any. Raises `CMoEError` if a file cannot be written.
    """
    renamed = False
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:  # its names alone: files may be large
            if all(name == current_name(model_type, name) for name in file.keys()):  # noqa: SIM118
                continue
        renamed = True
        tensors = load_file(path).items()
        content = {current_name(model_type, name): tensor for name, tensor in tensors}
        write = partial(save_file, content, metadata={"format": "pt"})
        replace_file(path, write)
    index = folder / WEIGHTS_INDEX
    if renamed and index.is_file():
        entries = read_json(index)
        where = entries["weight_map"].items()
        entries["weight_map"] = {current_name(model_type, name): file for name, file in where}
        replace_file(index, as_json(entries))
    return renamed
