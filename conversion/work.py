# SPDX-License-Identifier: Apache-2.0
"""The folder in which a conversion grows: complete at OUT, or visibly unfinished and resumable.

    OUT.partial/model-*.safetensors         finished shards: 0 outside the layers, then one a layer
    OUT.partial/work/settings.json          what was asked for, of which source, by which versions
    OUT.partial/work/manifest.json          what is finished: hash of each shard, figures of layers
    OUT.partial/work/states-N.safetensors   hidden states that enter layer N, the next one
    OUT.partial/work/conversion.log         the same for people
    OUT.partial/work/lock                   held by the process that is at work

Every file is written under another name and renamed, the manifest last: whenever the process dies,
the manifest names only what is whole. The work folder leaves before OUT.partial becomes OUT.
"""

import hashlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import filelock
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import cmoe_hf

from .checkpoint import WEIGHTS_INDEX, Source
from .errors import CMoEError, RequestError

REMOTE_CODE = ("configuration_cmoe.py", "modeling_cmoe.py")
SETTINGS, MANIFEST = "settings.json", "manifest.json"


class WorkFolder:
    """A conversion's folder; use it in a `with` block, see `create` and `reopen`.

    When the block fails, a folder in which layers are finished stays and can be resumed; one
    without is removed. When it ends well, the folder becomes OUT.
    """

    def __init__(self, output: str | Path, *, overwrite: bool = False) -> None:
        self.output = Path(output).expanduser().absolute()
        self.folder = self.output.with_name(self.output.name + ".partial")
        self.private = self.folder / "work"
        self.overwrite = overwrite
        self.settings: dict[str, Any] = {}
        """What must not change between the sessions of a conversion."""
        self.figures: list[dict[str, Any]] = []
        """Figures of the finished layers."""
        self.seconds = 0.0
        """Time spent on them, in all sessions."""
        self._shards: dict[str, dict[str, Any]] = {}
        self._states: dict[str, Any] | None = None
        self._lock = filelock.FileLock(self.private / "lock", timeout=0)
        self._since = time.perf_counter()

    @property
    def layers_done(self) -> int:
        """Finished layers."""
        return len(self.figures)

    @property
    def resume_hint(self) -> str:
        """How to go on."""
        return f"go on with: cmoe convert {shlex.quote(str(self.output))} --resume"

    def check(self, source: Source) -> None:
        """Refuse an output folder that is the source, or that holds something already."""
        if self.output == source.folder.absolute():
            raise RequestError("the output folder is the source checkpoint itself.")
        self._refuse_contents()

    def _refuse_contents(self) -> None:
        if self.overwrite:
            if self.output.exists() and not (self.output / "config.json").is_file():
                raise RequestError(
                    f"{self.output.name} exists and is not a model repository (no config.json): "
                    "--overwrite will not delete it."
                )
            return
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise RequestError(
                f"{self.output.name} exists already in {self.output.parent}. Choose another "
                "output folder, or pass --overwrite to replace it."
            )
        begun = (self.private / SETTINGS).is_file()
        if begun:
            self._acquire(make=False)
            self._lock.release()
        if begun or (self.folder.exists() and set(_names(self.folder)) - {"work"}):
            raise RequestError(
                f"{self.folder.name} exists already in {self.folder.parent}: "
                + (f"{self.resume_hint}, or" if begun else "choose another output folder, or")
                + " pass --overwrite to start again."
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
            for path in [*work.folder.iterdir(), *work.private.iterdir()]:
                if path.name not in ("work", "lock"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            work.settings = settings
            work._replace(work.private / SETTINGS, _json(settings))
        except BaseException:
            work._lock.release()
            raise
        work.log(f"started {_json(settings)}")
        return work

    @classmethod
    def reopen(cls, output: str | Path) -> Self:
        """Lock an unfinished conversion and read what is done.

        Raises `RequestError` if there is none or another process is at work there, and
        `CMoEError` if a finished file is damaged.
        """
        work = cls(output)
        leaving = work.output.with_name(work.output.name + ".work")
        if work.folder.is_dir() and leaving.is_dir() and not work.private.exists():
            leaving.rename(work.private)  # it was killed between the last two renames
        if not (work.private / SETTINGS).is_file():
            raise RequestError(
                f"there is no unfinished conversion at {work.folder}: start it without --resume."
            )
        work._acquire(make=False)
        try:
            work._read()
        except BaseException:
            work._lock.release()
            raise
        work.log(f"resumed with {work.layers_done} layers finished")
        return work

    def _read(self) -> None:
        self.settings = json.loads((self.private / SETTINGS).read_text(encoding="utf-8"))
        manifest = {}
        if (self.private / MANIFEST).is_file():
            manifest = json.loads((self.private / MANIFEST).read_text(encoding="utf-8"))
            self.figures, self.seconds = manifest["layers"], manifest["seconds"]
            self._shards, self._states = manifest["shards"], manifest["states"]
        whole = {record["file"]: record["sha256"] for record in self._shards.values()}
        if self._states is not None:
            whole["work/" + self._states["file"]] = self._states["sha256"]
        for name, sha256 in whole.items():
            path = self.folder / name
            if not path.is_file() or _sha256(path) != sha256:
                raise CMoEError(
                    f"{path.name} of the unfinished conversion is missing or damaged: it cannot "
                    "be resumed. Start again with --overwrite."
                )
        for path in [*self.folder.iterdir(), *self.private.glob("states-*")]:
            if path != self.private and str(path.relative_to(self.folder)) not in whole:
                path.unlink()  # was being written when the process died

    def _acquire(self, *, make: bool) -> None:
        try:
            if make:
                self.private.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except filelock.Timeout:
            raise RequestError(
                f"another process is converting into {self.folder} right now. Wait for it, or "
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
            elif self.layers_done == 0:
                shutil.rmtree(self.folder, ignore_errors=True)
            else:
                self.log(f"stopped: {kind.__name__ if kind else ''} {error}")
                error.add_note(f"Layers finished: {self.layers_done}; {self.resume_hint}")
        finally:
            self._lock.release()

    def _finish(self) -> None:
        leaving = self.output.with_name(self.output.name + ".work")
        replaced = self.output.with_name(self.output.name + ".replaced")
        shutil.rmtree(leaving, ignore_errors=True)
        self.private.rename(leaving)
        if self.output.exists():
            self.output.rename(replaced)
        self.folder.rename(self.output)
        shutil.rmtree(replaced, ignore_errors=True)
        shutil.rmtree(leaving, ignore_errors=True)

    def log(self, message: str) -> None:
        """Add a line to conversion.log."""
        with open(self.private / "conversion.log", "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    def write_rest(self, tensors: dict[str, torch.Tensor], shards: int) -> None:
        """Write the shard of the tensors outside the layers, unless that is done already."""
        if "0" not in self._shards:
            self._write_shard(0, shards, tensors)
            self._write_manifest()

    def write_layer(
        self,
        index: int,
        shards: int,
        tensors: dict[str, torch.Tensor],
        figures: dict[str, Any],
        states: dict[str, torch.Tensor],
    ) -> None:
        """Write a finished layer, and the hidden states that enter the next one."""
        self._write_shard(index + 1, shards, tensors)
        former, self._states = self._states, None
        if index + 2 < shards:
            path = self.private / f"states-{index + 1}.safetensors"
            self._replace(path, lambda new: save_file(states, new))
            self._states = {"file": path.name, "sha256": _sha256(path)}
        self.figures.append(figures)
        self._write_manifest()
        if former is not None:
            (self.private / former["file"]).unlink()

    def read_states(self) -> dict[str, torch.Tensor]:
        """The hidden states that enter the next layer; empty before the first."""
        if self._states is None:
            return {}
        with safe_open(
            self.private / self._states["file"], framework="pt", backend="pread"
        ) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def _write_shard(self, number: int, shards: int, tensors: dict[str, torch.Tensor]) -> None:
        path = self.folder / f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        self._replace(path, lambda new: save_file(tensors, new, metadata={"format": "pt"}))
        self._shards[str(number)] = {
            "file": path.name,
            "sha256": _sha256(path),
            "tensors": sorted(tensors),
            "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        }

    def _write_manifest(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now
        manifest = {
            "shards": self._shards,
            "states": self._states,
            "layers": self.figures,
            "seconds": self.seconds,
        }
        self._replace(self.private / MANIFEST, _json(manifest))

    def _replace(self, path: Path, content: str | Callable[[Path], Any]) -> None:
        """Write a file under another name, to the disk, then give it its own."""
        new = path.with_name(path.name + ".new")
        try:
            new.write_text(content, encoding="utf-8") if isinstance(content, str) else content(new)
            with open(new, "rb") as file:
                os.fsync(file.fileno())
            new.replace(path)
        except (OSError, SafetensorError) as error:
            new.unlink(missing_ok=True)
            raise CMoEError(f"cannot write {path.name} in {self.folder}: {error}.") from error

    def write_index(self) -> None:
        """Write the index of all shards."""
        records = self._shards.values()
        where = {tensor: record["file"] for record in records for tensor in record["tensors"]}
        size = sum(record["bytes"] for record in records)
        self.write_json(
            WEIGHTS_INDEX,
            {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))},
        )

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write one JSON file of the repository."""
        self.write_text(name, _json(content))

    def write_text(self, name: str, text: str) -> None:
        """Write one text file of the repository."""
        self._replace(self.folder / name, text)

    def copy_code(self) -> None:
        """Copy the two Python files that make the repository loadable without this package."""
        here = Path(cmoe_hf.__file__).parent
        for name in REMOTE_CODE:
            shutil.copyfile(here / name, self.folder / name)

    def copy_from(self, source: Source, *patterns: str) -> None:
        """Copy the source's files that match any pattern, contents unchanged."""
        for pattern in patterns:
            for path in sorted(source.folder.glob(pattern)):
                shutil.copyfile(path, self.folder / path.name)


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else [folder.name]


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
