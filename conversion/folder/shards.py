# SPDX-License-Identifier: Apache-2.0
"""The files of a repository's weights: as large as people expect, written without loading them.

A file is laid out as safetensors does it: a header that says where each tensor is, then the
tensors, wide types first and otherwise by name. The same tensors are the same bytes.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

CHUNK = 1 << 24
"""Bytes that are copied at a time."""


@dataclass(frozen=True)
class Entry:
    """What a header says of a tensor."""

    dtype: str
    shape: list[int]
    nbytes: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Entry":
        """Of a tensor, which may be on the meta device."""
        [size] = struct.unpack("<Q", (file := save({"": tensor.new_empty(0, device="cpu")}))[:8])
        dtype = json.loads(file[8 : 8 + size])[""]["dtype"]  # as the library calls it
        return cls(dtype, list(tensor.shape), tensor.nbytes)


def packed(parts: Sequence[Mapping[str, int]], limit: int) -> list[list[str]]:
    """Which tensors share a file.

    Args:
        parts: What belongs together, for example a layer: sizes in bytes by name. A part that is
            larger than a file is cut between its tensors, another one only goes where it fits.
        limit: Bytes of a file; a single tensor may have more.

    Returns:
        Names for each file, in the order of the parts.
    """
    files: list[list[str]] = [[]]
    room = limit
    for part in parts:
        whole = sum(part.values()) <= limit
        for names in [list(part)] if whole else [[name] for name in part]:
            size = sum(part[name] for name in names)
            if size > room and files[-1]:
                files.append([])
                room = limit
            files[-1] += names
            room -= size
    return files


def file_names(count: int) -> list[str]:
    """What loaders look for: one file, or numbered ones."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_of(files: Mapping[str, Iterable[str]], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The content of the index: which file holds each tensor."""
    where = {tensor: file for file, tensors in files.items() for tensor in tensors}
    total = sum(sizes[tensor] for tensor in where)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}


def write_shard(
    path: Path, entries: Mapping[str, Entry], pieces: Iterable[tuple[str, Iterable[Any]]]
) -> None:
    """Write one file. `pieces` are the tensors of `entries` in any order, their bytes in chunks."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(entries, key=lambda name: (-_width(entries[name]), name)):
        begin, end = end, end + entries[name].nbytes
        entry = entries[name]
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, chunks in pieces:
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            for chunk in chunks:
                file.write(chunk)


def _width(entry: Entry) -> float:
    """Bytes of a number."""
    return entry.nbytes / max(1, torch.Size(entry.shape).numel())


def join(path: Path, sources: Iterable[Path], names: Iterable[str]) -> None:
    """Write one file of these tensors of other files, a chunk in memory at a time."""
    wanted = set(names)
    entries, places = {}, {}
    for source in sources:
        header, start = read_header(source)
        for name in wanted & header.keys():
            begin, end = header[name]["data_offsets"]
            entries[name] = Entry(header[name]["dtype"], header[name]["shape"], end - begin)
            places[name] = (source, start + begin, end - begin)
    write_shard(path, entries, ((name, _chunks(*places[name])) for name in sorted(places)))


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a file, and where its tensors begin."""
    with open(path, "rb") as file:
        [size] = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(size)), 8 + size


def _chunks(path: Path, begin: int, size: int) -> Iterator[bytes]:
    """A part of a file."""
    with open(path, "rb") as file:
        file.seek(begin)
        while size > 0 and (chunk := file.read(min(CHUNK, size))):
            yield chunk
            size -= len(chunk)


def raw(tensor: torch.Tensor) -> Any:
    """The bytes of a tensor."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
