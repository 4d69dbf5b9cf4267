# SPDX-License-Identifier: Apache-2.0
"""The folder in which a conversion grows, a layer at a time.

    OUT.partial/repository/model*.safetensors   the weights; what is not finished is zeros
    OUT.partial/work/settings.json              what was asked for, of which source and versions
    OUT.partial/work/windows.safetensors        the calibration windows, or
    OUT.partial/work/own/N.safetensors          batches of those that the dense model writes
    OUT.partial/work/manifest.json              what is finished: hashes, figures of the layers
    OUT.partial/work/states-N.safetensors       hidden states that enter layer N, the next one
    OUT.partial/work/conversion.log             a log for people

The manifest is written last: whenever the process dies, it names only what is on the disk.
"""

import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cmoe_hf import CMoEConfig

from ..errors import CMoEError
from ..source.checkpoint import Source
from ..source.stored import CARVABLE, digest_of, read_headers, read_tensors
from .json_utils import as_json
from .paths import remove, replace_file
from .shards import Shards
from .unfinished import PartialFolder, sha256_of

MANIFEST = "manifest.json"


def planned_tensors(
    source: Source, config: CMoEConfig, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Return what a conversion will write, on the meta device: names, types and shapes.

    What the source has too keeps its type, what carving adds has that of the FFN, unless a
    `dtype` is asked for.
    """
    arch = source.architecture
    with torch.device("meta"):
        # A copy: the library writes the choice of attention into it.
        state = arch.cmoe_model(copy.deepcopy(config)).state_dict()
    stored = {name: CARVABLE[it.dtype] for name, it in source.tensors.items()}
    if arch.router:
        kept = {name: it for name, it in stored.items() if name.endswith(arch.router)}
        parent = "mlp.gate.parent_weight"
        stored |= {name.removesuffix(arch.router) + parent: it for name, it in kept.items()}
    layers = arch.layer_prefix.partition("{")[0]
    planned = {}
    for name, tensor in state.items():
        is_inside = name.startswith(layers)
        if not is_inside and name not in stored:
            continue  # a head that is tied to the embedding
        number = int(name.removeprefix(layers).partition(".")[0]) if is_inside else -1
        wanted = dtype or stored.get(name) or CARVABLE[source.ffn(number)[0].dtype]
        wanted = torch.float32 if name.endswith("balance_bias") else wanted
        planned[name] = torch.empty_like(tensor, dtype=wanted)
    return planned


class WorkFolder(PartialFolder):
    """Hold the folder of a conversion."""

    command = "convert"
    noun = "conversion"

    def __init__(self, output: str | Path, *, overwrite: bool = False) -> None:
        super().__init__(output, overwrite=overwrite)
        self.figures: list[dict[str, Any]] = []
        """Figures of the finished layers."""
        self.seconds = 0.0
        """Time spent on them, in all sessions."""
        self._parts: list[dict[str, Any]] = []
        """Names and hash of the tensors outside the layers, then of those of each layer."""
        self._states: dict[str, str] | None = None
        """File and hash of the hidden states."""
        self._since = time.perf_counter()

    @property
    def layers_done(self) -> int:
        """Return the number of finished layers."""
        return len(self.figures)

    @property
    def finished(self) -> str:
        """Return the number of finished layers in words."""
        return f"Layers finished: {self.layers_done}" if self.figures else super().finished

    def read_finished(self) -> None:
        """Take up the manifest and check what it names. Raises `CMoEError` if it is damaged."""
        kept = set(self.folder.glob("model*.safetensors*"))
        remove(path for path in self.folder.iterdir() if path not in kept)
        if not (self.private / MANIFEST).is_file():
            return
        manifest = json.loads((self.private / MANIFEST).read_text(encoding="utf-8"))
        self.figures, self.seconds = manifest["layers"], manifest["seconds"]
        self._parts, self._states = manifest["parts"], manifest["states"]
        try:
            stored = read_headers(self.folder)
            for number, part in enumerate(self._parts):
                tensors = read_tensors({name: stored[name] for name in part["tensors"]})
                if digest_of(tensors) != part["sha256"]:
                    raise CMoEError(f"layer {number - 1}" if number else "the embedding")
            if self._states and sha256_of(self._states_path()) != self._states["sha256"]:
                raise CMoEError(self._states["file"])
        except (CMoEError, KeyError, OSError, SafetensorError) as error:
            raise CMoEError(
                f"what is finished of the {self.noun} is missing or damaged ({error}): it cannot "
                "be resumed. Start again with --overwrite."
            ) from error

    def _states_path(self) -> Path:
        assert self._states is not None
        return self.private / self._states["file"]

    def create_weights(self, planned: dict[str, torch.Tensor], limit: int) -> None:
        """Make files of at most `limit` bytes for these tensors, unless they are there already."""
        self._shards = Shards(self.folder, planned, limit)
        self._shards.create()

    def write_rest(self, tensors: dict[str, torch.Tensor]) -> None:
        """Write the tensors outside the layers, unless that is done already."""
        if not self._parts:
            self._write_part(tensors)
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
        self._write_part(tensors)
        former, self._states = self._states, None
        if index + 1 < layers:
            path = self.private / f"states-{index + 1}.safetensors"
            replace_file(path, lambda new: save_file(states, new))
            self._states = {"file": path.name, "sha256": sha256_of(path)}
        self._write_manifest(figures)
        self.figures.append(figures)
        if former is not None:
            (self.private / former["file"]).unlink()

    def read_states(self) -> dict[str, torch.Tensor]:
        """Return the hidden states that enter the next layer; none before the first."""
        if self._states is None:
            return {}
        with safe_open(self._states_path(), framework="pt", backend="pread") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def _write_part(self, tensors: dict[str, torch.Tensor]) -> None:
        """Write tensors in the types and shapes that were planned for them."""
        planned = self._shards.tensors
        tensors = {name: tensor.to(planned[name].dtype) for name, tensor in sorted(tensors.items())}
        assert all(tensor.shape == planned[name].shape for name, tensor in tensors.items())
        self._shards.write({name: [tensor] for name, tensor in tensors.items()})
        self._parts.append({"tensors": list(tensors), "sha256": digest_of(tensors.items())})

    def _write_manifest(self, *figures: dict[str, Any]) -> None:
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now
        manifest = {
            "parts": self._parts,
            "states": self._states,
            "layers": [*self.figures, *figures],
            "seconds": self.seconds,
        }
        replace_file(self.private / MANIFEST, as_json(manifest))
