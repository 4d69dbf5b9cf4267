# SPDX-License-Identifier: Apache-2.0
"""A repository folder that grows: complete at OUT, or visibly unfinished and resumable.

    OUT.partial/                    what is finished
    OUT.partial/work/settings.json  what was asked for
    OUT.partial/work/lock           held by the process that is at work

Every file is written under another name and renamed. The work folder leaves before OUT.partial
becomes OUT.
"""

import hashlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import filelock

from cmoe_hf import CMoEConfig

from ..errors import RequestError
from .paths import check_apart, check_place, remove, replace_file, resolved
from .selection import code_of
from .strict import to_json

SETTINGS = "settings.json"


class PartialFolder:
    """The folder of one verb; use it in a `with` block, see `create` and `reopen`.

    When the block fails, a folder with anything finished stays and can be resumed; another is
    removed. When it ends well, the folder becomes OUT.
    """

    command: ClassVar[str]
    """Which one resumes it, for example `convert`."""
    noun: ClassVar[str]
    """What happens in it, for example `conversion`; also the name of the log."""

    def __init__(self, output: str | Path, *, overwrite: bool = False) -> None:
        self.output = resolved(output)
        self.folder = self.output.with_name(self.output.name + ".partial")
        self.private = self.folder / "work"
        self.leaving = self.output.with_name(self.output.name + ".work")
        """The private folder between its last two moments."""
        self.replaced = self.output.with_name(self.output.name + ".replaced")
        """What was at OUT, until the new one is."""
        self.overwrite = overwrite
        self.settings: dict[str, Any] = {}
        """What must not change between the sessions of the work."""
        self._lock = filelock.FileLock(self.private / "lock", timeout=0)

    @property
    def finished(self) -> str:
        """What a resumed run need not do again, in words; empty for nothing."""
        raise NotImplementedError

    def read_finished(self) -> None:
        """Take up what an earlier session finished. Raises `CMoEError` if it is damaged."""
        raise NotImplementedError

    @property
    def resume_hint(self) -> str:
        """How to go on; empty for work that starts again."""
        return f"go on with: cmoe {self.command} {shlex.quote(str(self.output))} --resume"

    def check(self, inputs: Mapping[str, str | Path | None]) -> None:
        """Refuse an output folder that cannot be made, or that holds something already.

        `inputs` is what the work reads, by what to call it: it must lie elsewhere.
        """
        self.check_apart(inputs)
        check_place(self.folder, self.output)
        self._refuse_contents()

    def check_apart(self, inputs: Mapping[str, str | Path | None]) -> None:
        """Raises `RequestError` if the work would destroy one of these."""
        check_apart(self.output, inputs, self.folder, self.leaving, self.replaced)

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

    def _refuse_contents(self) -> None:
        self._refuse_output()
        for path in (self.leaving, self.replaced):
            ours = path == self.leaving and (path / SETTINGS).is_file()
            if os.path.lexists(path) and not ours:
                raise RequestError(
                    f"{path.name} exists in {path.parent}, left when a process was killed, or "
                    "something of yours. The work needs this name: move it away."
                )
        if self.overwrite:
            return
        begun = (self.private / SETTINGS).is_file()
        if begun:
            self._acquire(make=False)
            self._lock.release()
        there = self.folder.exists() and not self.folder.is_dir()
        there |= self.folder.is_dir() and any(it.name != "work" for it in self.folder.iterdir())
        if begun or there:
            hint = self.resume_hint if begun else ""
            raise RequestError(
                f"{self.folder.name} exists already in {self.folder.parent}: "
                f"{hint or 'choose another output folder'}, or pass --overwrite to start again."
            )

    @classmethod
    def create(cls, output: str | Path, settings: dict[str, Any], *, overwrite: bool) -> Self:
        """Lock and empty OUT.partial and freeze `settings` in it.

        Raises `RequestError` if another process is at work there, or something is there already.
        """
        work = cls(output, overwrite=overwrite)
        work._acquire(make=True)
        try:
            work._refuse_contents()
            found = [*work.folder.iterdir(), *work.private.iterdir()]
            remove(path for path in found if path.name not in ("work", "lock"))
            work.settings = {"work": cls.noun, "overwrite": overwrite, **settings}
            work.replace(work.private / SETTINGS, as_json(work.settings))
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
        if work.folder.is_dir() and work.leaving.is_dir() and not work.private.exists():
            work.leaving.rename(work.private)  # it was killed between the last two renames
        if not (work.private / SETTINGS).is_file():
            raise RequestError(
                f"there is no unfinished {cls.noun} at {work.folder}: start it without --resume."
            )
        work._acquire(make=False)
        try:
            work.settings = json.loads((work.private / SETTINGS).read_text(encoding="utf-8"))
            if work.settings["work"] != cls.noun:
                raise RequestError(
                    f"{work.folder.name} holds an unfinished {work.settings['work']}, not a "
                    f"{cls.noun}: resume it with its own command."
                )
            work.overwrite = work.settings.get("overwrite", False)
            check_place(work.folder, work.output)
            work._refuse_output()
            work.read_finished()
        except BaseException:
            work._lock.release()
            raise
        work.log(f"resumed; {work.finished or 'nothing finished yet'}")
        return work

    def check_unchanged(self, found: Mapping[str, Any]) -> None:
        """Raises `RequestError` if one of these is not what the settings say."""
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
                f"another {self.noun} into {self.folder} is running right now. Wait for it, or "
                "choose another output folder."
            ) from None
        except OSError as error:
            raise RequestError(f"cannot create {self.folder.name}: {error.strerror}.") from error

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
                shutil.rmtree(self.folder, ignore_errors=True)
            else:
                self.log(f"stopped: {kind.__name__ if kind else ''} {error}")
                error.add_note(f"{self.finished}; {self.resume_hint}")
        finally:
            self._lock.release()

    def _finish(self) -> None:
        shutil.rmtree(self.leaving, ignore_errors=True)
        self.private.rename(self.leaving)
        if self.output.exists():
            self.output.rename(self.replaced)
        self.folder.rename(self.output)
        shutil.rmtree(self.replaced, ignore_errors=True)
        shutil.rmtree(self.leaving, ignore_errors=True)

    def log(self, message: str) -> None:
        """Add a line to the log."""
        with open(self.private / f"{self.noun}.log", "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    def replace(self, path: Path, content: str | bytes | Callable[[Path], Any]) -> None:
        """`paths.replace_file`, for a file of this folder."""
        replace_file(path, content)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write one JSON file of the repository."""
        self.write_text(name, as_json(content))

    def write_text(self, name: str, text: str) -> None:
        """Write one text file of the repository."""
        self.replace(self.folder / name, text)

    def write_code(self, family: type[CMoEConfig]) -> dict[str, str]:
        """Write the two Python files that make the repository loadable without this package.

        Returns their names and SHA-256 hashes.
        """
        code = code_of(family)
        for name, text in code.items():
            self.write_text(name, text)
        return {name: sha256_of(self.folder / name) for name in code}

    def write_files(self, files: Mapping[str, bytes]) -> None:
        """Write files of the repository that were read elsewhere, by name."""
        for name, content in files.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            self.replace(self.folder / name, content)


class BriefFolder(PartialFolder):
    """A folder of work that takes a moment: interrupted, it starts again."""

    finished = ""
    resume_hint = ""

    def read_finished(self) -> None:
        """There is nothing to take up."""


def as_json(content: dict[str, Any]) -> str:
    """As it is written to files."""
    return to_json(content, indent=2, ensure_ascii=False) + "\n"


def sha256_of(path: Path) -> str:
    """Hash of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
