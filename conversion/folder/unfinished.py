# SPDX-License-Identifier: Apache-2.0
"""A repository folder that grows: complete at OUT, or visibly unfinished and resumable.

    OUT.partial/repository/         what becomes OUT
    OUT.partial/work/settings.json  what was asked for
    OUT.partial/work/lock           held by the process that is at work
    OUT.partial/replaced/           what was at OUT, for a moment

Small files are written under another name and renamed.
"""

import hashlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import filelock
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from cmoe_hf import CMoEConfig
from cmoe_hf.families import repository_code

from ..errors import CMoEError, RequestError
from .json_utils import as_json
from .paths import SUFFIX, check_apart, check_place, remove, replace_file, replace_folder, resolved

SETTINGS = "settings.json"
WINDOWS = "windows.safetensors"


class PartialFolder:
    """Hold the folder of one command in a `with` block, see `create` and `reopen`.

    When the block fails, a folder with anything finished stays and can be resumed; another is
    removed. When it ends well, the folder becomes OUT.
    """

    noun: ClassVar[str]
    """What happens in it, for example `conversion`; also the name of the log."""
    command: ClassVar[str] = ""
    """Which command resumes it, for example `convert`; empty for work that starts again."""

    def __init__(self, output: str | Path, *, overwrite: bool = False) -> None:
        self.output = resolved(output)
        self.partial = self.output.with_name(self.output.name + SUFFIX)
        self.folder = self.partial / "repository"
        self.private = self.partial / "work"
        self.replaced = self.partial / "replaced"
        self.own_text = self.private / "own"
        """What the dense model writes itself, see `own_text`."""
        self.overwrite = overwrite
        self.settings: dict[str, Any] = {}
        """What must not change between the sessions of the work."""
        self._lock = filelock.FileLock(self.private / "lock", timeout=0)

    @property
    def finished(self) -> str:
        """Return in words what a resumed run need not do again; empty for nothing."""
        written = len(list(self.own_text.glob("*.safetensors")))
        return f"Batches of text that the dense model has written: {written}" if written else ""

    def read_finished(self) -> None:
        """Take up what an earlier session finished. Raises `CMoEError` if it is damaged."""

    @property
    def _resume_hint(self) -> str:
        return f"go on with: cmoe {self.command} {shlex.quote(str(self.output))} --resume"

    def check(self, inputs: Mapping[str, str | Path | None]) -> None:
        """Raise `RequestError` for an output folder that cannot be made or is not empty.

        `inputs` is what the work reads, by what to call it: it must lie elsewhere.
        """
        self.check_apart(inputs)
        check_place(self.partial, self.output)
        self._refuse_contents()

    def check_apart(self, inputs: Mapping[str, str | Path | None]) -> None:
        """Raise `RequestError` if the work would destroy one of these."""
        check_apart(self.output, inputs, self.partial)

    def _refuse_output(self) -> None:
        there = os.path.lexists(self.output)
        if not there or (self.output.is_dir() and not any(self.output.iterdir())):
            return
        if not self.overwrite:
            raise RequestError(
                f"{self.output.name} exists already in {self.output.parent}. Choose another "
                "output folder, or pass --overwrite to replace it."
            )
        if not (self.output / "config.json").is_file():
            raise RequestError(
                f"{self.output.name} exists and is not a model repository (no config.json): "
                "--overwrite will not delete it."
            )

    @property
    def _is_begun(self) -> bool:
        return (self.private / SETTINGS).is_file() and self.folder.is_dir()

    def _refuse_contents(self) -> None:
        self._refuse_output()
        beside = f"{self.partial.name} exists already in {self.partial.parent}"
        if os.path.lexists(self.partial) and not self._holds_only_work():
            raise RequestError(
                f"{beside}, and something in it is not ours, or was at {self.output.name} when a "
                "process was killed. The work needs this name: move it away."
            )
        if self._is_begun:
            self._acquire(make=False)
            self._lock.release()
            if not self.overwrite:
                hint = self._resume_hint if self.command else "choose another output folder"
                raise RequestError(f"{beside}: {hint}, or pass --overwrite to start again.")

    def _holds_only_work(self) -> bool:
        if self.partial.is_symlink() or not self.partial.is_dir():
            return False
        return {path.name for path in self.partial.iterdir()} <= {"repository", "work"}

    @classmethod
    def create(cls, output: str | Path, settings: dict[str, Any], *, overwrite: bool) -> Self:
        """Lock and empty OUT.partial and freeze `settings` in it.

        Raises `RequestError` if another process is at work there, or something is there already.
        """
        work = cls(output, overwrite=overwrite)
        work._acquire(make=True)
        try:
            work._refuse_contents()
            shutil.rmtree(work.folder, ignore_errors=True)
            remove(path for path in work.private.iterdir() if path.name != "lock")
            work.folder.mkdir()
            work.settings = {"work": cls.noun, "overwrite": overwrite, **settings}
            replace_file(work.private / SETTINGS, as_json(work.settings))
        except BaseException:
            work._lock.release()
            raise
        work.log(f"started {as_json(settings)}")
        return work

    @classmethod
    def reopen(cls, output: str | Path) -> Self:
        """Lock unfinished work and read what is done.

        Raises `RequestError` if there is none or another process is at work there, and
        `CMoEError` if a finished file is damaged.
        """
        work = cls(output)
        if not work._is_begun:
            raise RequestError(
                f"there is no unfinished {cls.noun} at {work.partial}: start it without --resume."
            )
        work._acquire(make=False)
        try:
            work.settings = json.loads((work.private / SETTINGS).read_text(encoding="utf-8"))
            if work.settings["work"] != cls.noun:
                raise RequestError(
                    f"{work.partial.name} holds an unfinished {work.settings['work']}, not a "
                    f"{cls.noun}: resume it with its own command."
                )
            work.overwrite = work.settings.get("overwrite", False)
            check_place(work.partial, work.output)
            work._refuse_output()
            work.read_finished()
        except BaseException:
            work._lock.release()
            raise
        work.log(f"resumed; {work.finished or 'nothing finished yet'}")
        return work

    def recorded(self, name: str) -> Any:
        """Return one of the settings. Raises `RequestError` if an older release wrote them."""
        if name not in self.settings:
            raise self.older()
        return self.settings[name]

    def older(self) -> RequestError:
        """Return the error of settings that this release cannot read."""
        return RequestError(
            f"this {self.noun} was begun by an older release, whose notes cannot be read. Start "
            "again with --overwrite."
        )

    def check_unchanged(self, found: Mapping[str, Any]) -> None:
        """Raise `RequestError` if one of these is not what the settings say."""
        for name, value in found.items():
            if value != self.settings[name]:
                raise RequestError(
                    f"{name.replace('_', ' ')} has changed since this {self.noun} started (it was "
                    f"{self.settings[name]}, it is {value}). Restore it, or start again with "
                    "--overwrite."
                )

    def _acquire(self, *, make: bool) -> None:
        try:
            if make:
                self.private.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except filelock.Timeout:
            raise RequestError(
                f"another {self.noun} into {self.partial} is running right now. Wait for it, or "
                "choose another output folder."
            ) from None
        except OSError as error:
            raise RequestError(f"cannot create {self.partial.name}: {error.strerror}.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._finish()
            elif not self.finished:
                shutil.rmtree(self.partial, ignore_errors=True)
            else:
                self.log(f"stopped: {kind.__name__ if kind else ''} {error}")
                error.add_note(f"{self.finished}; {self._resume_hint}")
        finally:
            self._lock.release()
        with suppress(OSError):  # they are gone, unless a locked file could not be removed
            self.private.rmdir()
            self.partial.rmdir()

    def _finish(self) -> None:
        replace_folder(self.folder, self.output, self.replaced)
        shutil.rmtree(self.partial, ignore_errors=True)

    def log(self, message: str) -> None:
        """Add a line to the log."""
        with open(self.private / f"{self.noun}.log", "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    def keep_windows(self, **windows: torch.Tensor) -> None:
        """Write the token windows, so that no text is read a second time."""
        kept = {name: window_WL.contiguous() for name, window_WL in windows.items()}
        replace_file(self.private / WINDOWS, lambda new: save_file(kept, new))

    def kept_windows(self) -> dict[str, torch.Tensor] | None:
        """Return what `keep_windows` wrote, if it came to that. Raises `CMoEError` for damage."""
        path = self.private / WINDOWS
        if not path.is_file():
            return None
        try:
            return load(path.read_bytes())
        except (OSError, SafetensorError) as error:
            raise CMoEError(
                f"{WINDOWS} of the unfinished {self.noun} is damaged: it cannot be resumed. Start "
                "again with --overwrite."
            ) from error

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write one JSON file of the repository."""
        self.write_files({name: as_json(content)})

    def write_code(self, family: type[CMoEConfig]) -> dict[str, str]:
        """Write the Python files of the repository and return their SHA-256 by name."""
        code = repository_code(family)
        self.write_files(code)
        return {name: sha256_of(self.folder / name) for name in code}

    def write_files(self, files: Mapping[str, str | bytes]) -> None:
        """Write files of the repository, by name."""
        for name, content in files.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.folder / name, content)


def sha256_of(path: Path) -> str:
    """Return the hash of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
