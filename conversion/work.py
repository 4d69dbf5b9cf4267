# SPDX-License-Identifier: Apache-2.0
"""The folder in which a conversion grows, one shard for each finished layer.

    OUT.partial/model-*.safetensors         finished shards: 0 outside the layers, then one a layer
    OUT.partial/work/settings.json          what was asked for, of which source, by which versions
    OUT.partial/work/manifest.json          what is finished: hash of each shard, figures of layers
    OUT.partial/work/states-N.safetensors   hidden states that enter layer N, the next one
    OUT.partial/work/conversion.log         the same for people

The manifest is written last: whenever the process dies, it names only what is whole.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .checkpoint import WEIGHTS_INDEX
from .errors import CMoEError
from .partial import PartialFolder, as_json, sha256_of
from .paths import remove

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
        self._shards: dict[str, dict[str, Any]] = {}
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
            self._shards, self._states = manifest["shards"], manifest["states"]
        whole = {record["file"]: record["sha256"] for record in self._shards.values()}
        if self._states is not None:
            whole["work/" + self._states["file"]] = self._states["sha256"]
        for name, sha256 in whole.items():
            path = self.folder / name
            if not path.is_file() or sha256_of(path) != sha256:
                raise CMoEError(
                    f"{path.name} of the unfinished conversion is missing or damaged: it cannot "
                    "be resumed. Start again with --overwrite."
                )
        found = [*self.folder.iterdir(), *self.private.glob("states-*")]
        remove(  # what was being written when the process died
            path
            for path in found
            if path != self.private and str(path.relative_to(self.folder)) not in whole
        )

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

    def _write_shard(self, number: int, shards: int, tensors: dict[str, torch.Tensor]) -> None:
        path = self.folder / f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        self.replace(path, lambda new: save_file(tensors, new, metadata={"format": "pt"}))
        self._shards[str(number)] = {
            "file": path.name,
            "sha256": sha256_of(path),
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
        self.replace(self.private / MANIFEST, as_json(manifest))

    def write_index(self) -> None:
        """Write the index of all shards."""
        records = self._shards.values()
        where = {tensor: record["file"] for record in records for tensor in record["tensors"]}
        size = sum(record["bytes"] for record in records)
        self.write_json(
            WEIGHTS_INDEX,
            {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))},
        )
