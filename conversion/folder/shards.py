# SPDX-License-Identifier: Apache-2.0
"""The weight files of a repository, written in place: every tensor has its position beforehand.

A file is laid out as safetensors does it: a header that says where each tensor is, then the
tensors, wide types first and otherwise by name. The same tensors are the same bytes.
"""

import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from ..errors import CMoEError
from ..source.stored import CARVABLE, WEIGHTS_INDEX
from .json_utils import as_json
from .paths import replace_file

NAMES = {dtype: name for name, dtype in CARVABLE.items()}
"""Names of types in safetensors."""


class Shards:
    """Write the weight files in `folder`.

    Of `tensors` types and shapes count, so they can be on the meta device. `limit` is the size of a
    file, which only a single tensor may exceed.
    """

    def __init__(self, folder: Path, tensors: dict[str, torch.Tensor], limit: int) -> None:
        self.folder = folder
        self.tensors = tensors
        self._headers: dict[str, tuple[bytes, int]] = {}
        """Header and size of each file."""
        self._places: dict[str, tuple[str, int]] = {}
        """File and position of each tensor."""
        self._split = split_state_dict_into_shards_factory(
            tensors,
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=limit,
        )
        for file, names in self._split.filename_to_tensors.items():
            self._lay_out(file, names)

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
        if self._split.is_sharded:
            where = dict(sorted(self._split.tensor_to_filename.items()))
            index = {"metadata": self._split.metadata, "weight_map": where}
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


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of a file."""
    with open(path, "rb") as file:
        [size] = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(size))


def raw(tensor: torch.Tensor) -> Any:
    """Return the bytes of a tensor."""
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data
