# SPDX-License-Identifier: Apache-2.0
"""The weight files of a repository, written in place: every tensor has its position beforehand.

A file is laid out as safetensors does it: a header that says where each tensor is, then the
tensors, wide types first and otherwise by name. The same tensors are the same bytes.
"""

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import CMoEError
from ..source.stored import CARVABLE, WEIGHTS_FILE, WEIGHTS_INDEX
from .json_utils import as_json
from .paths import replace_file

NAMES = {dtype: name for name, dtype in CARVABLE.items()}
"""Names of types in safetensors."""


class Shards:
    """Write the weight files in `folder`.

    `parts` are tensors by name that belong together, for example those of a layer; their types and
    shapes count, so they can be on the meta device. `limit` is the size of a file, see `packed`.
    """

    def __init__(
        self, folder: Path, parts: Sequence[Mapping[str, torch.Tensor]], limit: int
    ) -> None:
        self.folder = folder
        self.tensors = {name: tensor for part in parts for name, tensor in part.items()}
        self._headers: dict[str, tuple[bytes, int]] = {}
        """Header and size of each file."""
        self._places: dict[str, tuple[str, int]] = {}
        """File and position of each tensor."""
        plan = packed([{name: it.nbytes for name, it in part.items()} for part in parts], limit)
        for number, names in enumerate(plan, 1):
            shard = f"model-{number:05d}-of-{len(plan):05d}.safetensors"
            self._lay_out(WEIGHTS_FILE if len(plan) == 1 else shard, names)

    def _lay_out(self, file: str, names: list[str]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(names, key=lambda name: (-self.tensors[name].itemsize, name)):
            tensor = self.tensors[name]
            begin, end = end, end + tensor.nbytes
            about = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
            header[name] = {**about, "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        self._headers[file] = (struct.pack("<Q", len(text)) + text, start + end)
        for name in names:
            self._places[name] = (file, start + header[name]["data_offsets"][0])

    def create(self) -> None:
        """Write headers and index; what tensors have been written stays. Raises `CMoEError`."""
        for file, (header, size) in self._headers.items():
            self._write(file, [(0, [header])], size)
        if len(self._headers) > 1:
            where = {name: self._places[name][0] for name in sorted(self._places)}
            size = sum(tensor.nbytes for tensor in self.tensors.values())
            index = {"metadata": {"total_size": size}, "weight_map": where}
            replace_file(self.folder / WEIGHTS_INDEX, as_json(index))

    def write(self, tensors: Mapping[str, Iterable[torch.Tensor]]) -> None:
        """Write tensors, each in consecutive pieces, to the disk. Raises `CMoEError`."""
        files: dict[str, list[tuple[int, Iterable[Any]]]] = {}
        for name, pieces in tensors.items():
            file, position = self._places[name]
            files.setdefault(file, []).append((position, map(raw, pieces)))
        for file, chunks in files.items():
            self._write(file, chunks, self._headers[file][1])

    def _write(self, file: str, chunks: list[tuple[int, Iterable[Any]]], size: int) -> None:
        path = self.folder / file
        try:
            with open(path, "r+b" if path.exists() else "w+b") as opened:
                opened.truncate(size)
                for position, pieces in chunks:
                    opened.seek(position)
                    opened.writelines(pieces)
                opened.flush()
                os.fsync(opened.fileno())
        except OSError as error:
            raise CMoEError(f"cannot write {file} in {self.folder}: {error}.") from error


def packed(parts: Sequence[Mapping[str, int]], limit: int) -> list[list[str]]:
    """Return which tensors share a file, in the order of the parts.

    Args:
        parts: What belongs together, for example a layer: sizes in bytes by name. A part that is
            larger than a file is cut between its tensors, another one only goes where it fits.
        limit: Bytes of a file; a single tensor may have more.
    """
    files: list[list[str]] = [[]]
    free = limit
    for part in parts:
        whole = sum(part.values()) <= limit
        for names in [list(part)] if whole else [[name] for name in part]:
            size = sum(part[name] for name in names)
            if size > free and files[-1]:
                files.append([])
                free = limit
            files[-1] += names
            free -= size
    return files


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of a file."""
    with open(path, "rb") as file:
        [size] = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(size))


def raw(tensor: torch.Tensor) -> Any:
    """Return the bytes of a tensor."""
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data
