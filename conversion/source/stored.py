# SPDX-License-Identifier: Apache-2.0
"""What lies in a model's folder: the place, type and shape of every tensor, from file headers.

Which files count, and which names mean the same tensor, is as the library's loader has it: what
is carved must be what everybody else loads.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import RequestError

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
CARVABLE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The types that can be carved, by their names in safetensors."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TensorRef:
    """A tensor in a file, or one expert's rows of a packed one."""

    path: Path
    key: str
    """Its name in the file."""
    dtype: str
    """As safetensors names it."""
    shape: list[int]
    expert: int | None = None
    """Which expert of a packed tensor; None for a whole tensor."""
    rows: tuple[int, int] = (0, 0)
    """Which rows of that expert."""

    @property
    def numel(self) -> int:
        """Return the number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the size in bytes, of a type that can be carved."""
        return self.numel * CARVABLE[self.dtype].itemsize

    def read(self, opened: Any) -> torch.Tensor:
        """Return the values, from the open file. Reads no more of a packed tensor."""
        if self.expert is None:
            return opened.get_tensor(self.key)
        return opened.get_slice(self.key)[self.expert, slice(*self.rows)]

    def of_expert(self, number: int, part: int, parts: int) -> "TensorRef":
        """Return one of the equal parts that lie below each other in a packed expert."""
        _, rows, columns = self.shape
        first, end = part * rows // parts, (part + 1) * rows // parts
        return replace(self, shape=[end - first, columns], expert=number, rows=(first, end))


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file of the source. Raises `RequestError` if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(
            f"{path.name} is not valid JSON ({error}). Download it again."
        ) from error
    if not isinstance(content, dict):
        raise RequestError(f"{path.name} is not a JSON object. Download it again.")
    return content


def weight_files(folder: Path) -> list[str]:
    """Return the files that the library would load, relative to the folder.

    That which the configuration names comes before a single file, and a single file before an
    index, which may be left over from an older save. Raises `RequestError` if there is none.
    """
    named = None
    if (folder / "config.json").is_file():
        named = read_json(folder / "config.json").get("transformers_weights")
    present = [file for file in (WEIGHTS_FILE, WEIGHTS_INDEX) if (folder / file).is_file()]
    if not (named or present):
        found = ", ".join(sorted(path.name for path in folder.glob("*.safetensors")))
        raise RequestError(
            f"{WEIGHTS_FILE} is missing"
            + (f" (there is {found}, which the library would not load)" if found else "")
            + ". Weights are read from safetensors only; complete the download, or convert other "
            "formats with `save_pretrained` first."
        )
    chosen = check_inside(str(named or present[0]), "config.json")
    if chosen == WEIGHTS_FILE and len(present) > 1:
        logger.warning("%s is read, as the library does; %s is ignored.", *present)
    if not chosen.endswith(".index.json"):
        return [chosen]
    where = read_json(folder / chosen).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise RequestError(f"{chosen} has no weight_map of tensors and files. Download it again.")
    return [check_inside(file, chosen) for file in sorted(set(where.values()))]


def check_inside(file: str, named_by: str) -> str:
    """Return a file's name as it is. Raises `RequestError` if it leads out of its folder."""
    if not is_inside(file):
        raise RequestError(
            f"{named_by} names {file}, which is outside the model's folder: it is not read. "
            "Download the model again, or move the file into the folder."
        )
    return file


def is_inside(name: str) -> bool:
    """Return whether a relative path stays in its folder, on every system."""
    path = PureWindowsPath(name)
    return not path.anchor and ".." not in path.parts


def read_headers(folder: Path) -> dict[str, TensorRef]:
    """Return every tensor of the folder's weights, by its name in the files.

    Raises `RequestError` for a file that is missing or damaged, and for a tensor in two files.
    """
    tensors: dict[str, TensorRef] = {}
    for file in weight_files(folder):
        path = folder / file
        if not path.is_file():
            raise RequestError(
                f"shard {file} is missing. Weights are read from safetensors only; complete the "
                "download, or convert other formats with `save_pretrained` first."
            )
        try:
            with safe_open(path, framework="pt", backend="pread") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict, cannot be iterated
                    if name in tensors:
                        raise RequestError(
                            f"tensor {name} is in both {tensors[name].path.name} and {file}: "
                            "nobody can say which one counts. Remove one, or download again."
                        )
                    about = opened.get_slice(name)
                    tensors[name] = TensorRef(path, name, about.get_dtype(), about.get_shape())
        except SafetensorError as error:
            raise RequestError(
                f"shard {file} is corrupt or truncated ({error}). Download it again."
            ) from error
    return tensors


def read_tensors(tensors: Mapping[str, TensorRef]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and values of each, file by file. A file is closed when its last one is read."""
    for path in dict.fromkeys(tensor.path for tensor in tensors.values()):
        with safe_open(path, framework="pt", backend="pread") as opened:
            for name, tensor in tensors.items():
                if tensor.path == path:
                    yield name, tensor.read(opened)


def digest_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the SHA-256 of names, types, shapes and values."""
    total = hashlib.sha256()
    for name, tensor in tensors:
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
