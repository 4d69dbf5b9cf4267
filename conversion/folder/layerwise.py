# SPDX-License-Identifier: Apache-2.0
"""The folder in which a conversion grows, one part for each finished layer, joined at the end.

    OUT.partial/model*.safetensors          what is joined already, when all layers are finished
    OUT.partial/work/settings.json          what was asked for, of which source, by which versions
    OUT.partial/work/windows.safetensors    the calibration windows: no text is read a second time
    OUT.partial/work/manifest.json          what is finished: hash of each file, figures of layers
    OUT.partial/work/rest.safetensors       the part outside the layers
    OUT.partial/work/layer-N.safetensors    the part of a finished layer
    OUT.partial/work/states-N.safetensors   hidden states that enter layer N, the next one
    OUT.partial/work/conversion.log         the same for people

The manifest is written last: whenever the process dies, it names only what is whole. A part goes
when all its tensors are in joined files, which takes the disk of one more of these.
"""

import json
import time
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..errors import CMoEError
from ..source.stored import WEIGHTS_INDEX
from .paths import remove
from .shards import file_names, index_of, join, packed
from .unfinished import PartialFolder, as_json, sha256_of

MANIFEST = "manifest.json"


class WorkFolder(PartialFolder):
    """A conversion's folder."""

    command = "convert"
    noun = "conversion"

    def __init__(self, output: str | Path, *, overwrite: bool = False) -> None:
        super().__init__(output, overwrite=overwrite)
        self.figures: list[dict[str, Any]] = []
        """Figures of the finished layers."""
        self.seconds = 0.0
        """Time spent on them, in all sessions."""
        self._parts: dict[str, dict[str, Any]] = {}
        """By number: 0 is outside the layers."""
        self._joined: dict[str, dict[str, Any]] = {}
        """By the name of the file."""
        self._states: dict[str, Any] | None = None
        self._since = time.perf_counter()

    @property
    def layers_done(self) -> int:
        """Finished layers."""
        return len(self.figures)

    @property
    def finished(self) -> str:
        """The finished layers, in words."""
        return f"Layers finished: {self.layers_done}" if self.figures else ""

    def read_finished(self) -> None:
        """Take up the manifest; remove what was being written when the process died."""
        manifest = {}
        if (self.private / MANIFEST).is_file():
            manifest = json.loads((self.private / MANIFEST).read_text(encoding="utf-8"))
            self.figures, self.seconds = manifest["layers"], manifest["seconds"]
            self._parts, self._states = manifest["parts"], manifest["states"]
            self._joined = manifest["joined"]
        records = [*self._needed(), *([self._states] if self._states else [])]
        whole = {self.private / record["file"]: record["sha256"] for record in records}
        whole |= {self.folder / name: record["sha256"] for name, record in self._joined.items()}
        for path, sha256 in whole.items():
            if not path.is_file() or sha256_of(path) != sha256:
                raise CMoEError(
                    f"{path.name} of the unfinished conversion is missing or damaged: it cannot "
                    "be resumed. Start again with --overwrite."
                )
        written = (self.private.glob(name) for name in ("rest.*", "layer-*", "states-*"))
        found = [*self.folder.iterdir(), *chain.from_iterable(written)]
        remove(path for path in found if path != self.private and path not in whole)

    def _needed(self) -> list[dict[str, Any]]:
        """The parts of which something is not joined yet, in order."""
        parts = [self._parts[number] for number in sorted(self._parts, key=int)]
        joined = {name for record in self._joined.values() for name in record["tensors"]}
        return [part for part in parts if part["tensors"].keys() - joined]

    def write_rest(self, tensors: dict[str, torch.Tensor]) -> None:
        """Write the tensors outside the layers, unless that is done already."""
        if "0" not in self._parts:
            self._write_part(0, "rest", tensors)
            self._write_manifest()

    def write_layer(
        self,
        index: int,
        layers: int,
        tensors: dict[str, torch.Tensor],
        figures: dict[str, Any],
        states: dict[str, torch.Tensor],
    ) -> None:
        """Write a finished layer, and the hidden states that enter the next one."""
        self._write_part(index + 1, f"layer-{index}", tensors)
        former, self._states = self._states, None
        if index + 1 < layers:
            path = self.private / f"states-{index + 1}.safetensors"
            self.replace(path, lambda new: save_file(states, new))
            self._states = {"file": path.name, "sha256": sha256_of(path)}
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

    def _write_part(self, number: int, name: str, tensors: dict[str, torch.Tensor]) -> None:
        path = self.private / f"{name}.safetensors"
        tensors = {name: tensors[name].contiguous().cpu() for name in sorted(tensors)}
        self.replace(path, lambda new: save_file(tensors, new, metadata={"format": "pt"}))
        self._parts[str(number)] = {
            "file": path.name,
            "sha256": sha256_of(path),
            "tensors": {name: tensor.nbytes for name, tensor in tensors.items()},
        }

    def _write_manifest(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now
        manifest = {
            "parts": self._parts,
            "joined": self._joined,
            "states": self._states,
            "layers": self.figures,
            "seconds": self.seconds,
        }
        self.replace(self.private / MANIFEST, as_json(manifest))

    def join(self, limit: int) -> None:
        """Make files of at most `limit` bytes of the parts, with an index if there are several."""
        sizes = [self._parts[number]["tensors"] for number in sorted(self._parts, key=int)]
        plan = packed(sizes, limit)
        files = dict(zip(file_names(len(plan)), plan, strict=True))
        for name, tensors in files.items():
            if name not in self._joined:
                self._join(name, tensors)
        if len(files) > 1:
            every = {name: size for part in sizes for name, size in part.items()}
            self.write_json(WEIGHTS_INDEX, index_of(files, every))

    def _join(self, name: str, tensors: list[str]) -> None:
        before = self._needed()
        sources = [self.private / part["file"] for part in before]
        self.replace(self.folder / name, lambda new: join(new, sources, tensors))
        self._joined[name] = {"sha256": sha256_of(self.folder / name), "tensors": tensors}
        self._write_manifest()
        remaining = self._needed()
        remove(self.private / part["file"] for part in before if part not in remaining)
