# SPDX-License-Identifier: Apache-2.0
"""Tensors made of stored ones: cut, joined, scaled or in another order."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open

from ..folder.shards import NAMES
from ..source.stored import CARVABLE, TensorRef


@dataclass(frozen=True)
class Made:
    """Rows of stored tensors below each other, reshaped; zeros if there are none."""

    shape: tuple[int, ...]
    dtype: str
    """The name that safetensors has for the type."""
    parts: tuple[TensorRef | torch.Tensor, ...] = ()
    factor: float = 1.0
    interleaved: int = 0
    """Heads of which the two halves are interleaved: rotary embeddings that turn neighbours."""
    precise: bool = False
    """Whether it stays float32 whatever the others become."""

    @classmethod
    def of(cls, *parts: TensorRef | torch.Tensor, **changes: Any) -> Self:
        """Join rows below each other."""
        shapes = [tuple(part.shape) for part in parts]
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        dtype = parts[0].dtype
        name = NAMES[dtype] if isinstance(dtype, torch.dtype) else dtype
        return replace(cls(shape, name, parts), **changes)

    @classmethod
    def zeros(cls, like: TensorRef, *shape: int) -> Self:
        """Return zeros of the same type."""
        return cls(shape, like.dtype)

    @classmethod
    def of_experts(cls, packed: TensorRef, part: int = 0, parts: int = 1) -> Self:
        """Take the same part of every packed expert, (N, rows, columns)."""
        pieces = [packed.of_expert(number, part, parts) for number in range(packed.shape[0])]
        return cls((len(pieces), *pieces[0].shape), packed.dtype, tuple(pieces))

    @property
    def empty(self) -> torch.Tensor:
        """Return its type and shape, as a tensor on the meta device."""
        return torch.empty(self.shape, dtype=CARVABLE[self.dtype], device="meta")

    def read(self, files: "Files") -> Iterator[torch.Tensor]:
        """Read the values, a part at a time."""
        dtype = CARVABLE[self.dtype]
        if not self.parts:
            yield torch.zeros(self.shape, dtype=dtype)
        for part in self.parts:
            tensor = (files.read(part) if isinstance(part, TensorRef) else part).to(dtype)
            if self.interleaved:
                halves = tensor.unflatten(0, (self.interleaved, 2, -1))
                tensor = halves.transpose(1, 2).flatten(0, 2)
            yield tensor if self.factor == 1 else tensor * self.factor


class Files(ExitStack):
    """Open files of weights; use it in a `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self._opened: dict[Path, Any] = {}

    def read(self, stored: TensorRef) -> torch.Tensor:
        """Read the values of a tensor."""
        if stored.path not in self._opened:
            opened = safe_open(stored.path, framework="pt", backend="pread")
            self._opened[stored.path] = self.enter_context(opened)
        return stored.read(self._opened[stored.path])


def by_layer(stored: Mapping[str, TensorRef]) -> dict[str, dict[str, TensorRef]]:
    """Group tensors by the prefix of their layer, "" for those of no layer, and the rest."""
    layers: dict[str, dict[str, TensorRef]] = defaultdict(dict)
    for name, tensor in stored.items():
        found = re.match(r"model\.layers\.\d+\.", name)
        layer = found[0] if found else ""
        layers[layer][name.removeprefix(layer)] = tensor
    return layers
