# SPDX-License-Identifier: Apache-2.0
"""Run one dense decoder layer on the calibration windows and profile its FFN.

Shape suffixes: W windows, L tokens of one window, T = W * L tokens, B windows or tokens of one
batch, H hidden size, F dense FFN width.
"""

import errno
import math
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from cmoe_hf import CMoEConfig

from ..device import Stopwatch
from ..errors import CMoEError
from ..source.checkpoint import PROOF_TOKENS, Source
from ..source.walk import LayerWalk
from .layer import FFN, Profile
from .recipe import Recipe

BATCH_TOKENS = 2048
"""Tokens that pass through a layer at once."""
PROFILED_TOKENS = 16_384
"""Tokens whose hidden activations are kept: enough for clusters and routers."""
CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
"""Errors of file systems without `fallocate`, and of C libraries that try to do without it."""

Output = Callable[[slice, torch.Tensor], torch.Tensor]
"""Maps a slice of tokens and their FFN inputs (B, H) to outputs (B, H)."""


@dataclass(frozen=True)
class Storage:
    """Where the activations of all calibration tokens are kept."""

    device: torch.device
    folder: Path | None = None
    """Map them from files in this folder instead of keeping them on the device."""

    def empty(self, name: str, *shape: int) -> torch.Tensor:
        """Create an uninitialised float32 tensor. Raises `CMoEError` if the disk is full."""
        if self.folder is None:
            return torch.empty(shape, device=self.device)
        path = self.folder / f"{name}.activations"
        try:
            with open(path, "w+b") as file:  # to read, too: some C libraries must, to reserve
                file.truncate(4 * math.prod(shape))
                reserve(file.fileno(), 4 * math.prod(shape), self.folder)
        except OSError as error:
            raise CMoEError(f"cannot keep activations in {path}: {error.strerror}.") from error
        flat = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=torch.float32)
        return flat.view(shape)


def reserve(descriptor: int, size: int, folder: Path) -> None:
    """Allocate a sparse file's blocks: without them a write to a mapped page kills the process.

    Where the file system cannot allocate ahead, check at least that there is space. Raises
    `OSError`.
    """
    try:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(descriptor, 0, size)
            return
    except OSError as error:
        if error.errno not in CANNOT_RESERVE:
            raise
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@dataclass
class Streams:
    """Hidden states of the calibration windows before a layer, (W, L, H), changed in place."""

    carved_WLH: torch.Tensor
    """After the carved layers so far."""
    dense_WLH: torch.Tensor | None
    """After the dense ones; None for a recipe that does not correct errors."""

    @classmethod
    def restored(cls, states: dict[str, torch.Tensor], storage: Storage) -> Self:
        """Return streams of these states, as `saved` names them."""
        kept = {name: storage.empty(name, *value.shape) for name, value in states.items()}
        for name, value in states.items():
            kept[name].copy_(value)
        return cls(kept["carved"], kept.get("dense"))

    def saved(self) -> dict[str, torch.Tensor]:
        """Return the states by name."""
        states = {"carved": self.carved_WLH, "dense": self.dense_WLH}
        return {name: value for name, value in states.items() if value is not None}

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.saved().values())

    @property
    def length(self) -> int:
        """Return the number of tokens of a window."""
        return self.carved_WLH.shape[1]

    @property
    def tokens(self) -> int:
        """Return the number of tokens of all windows."""
        return len(self.carved_WLH) * self.length


@dataclass
class Walk(ABC):
    """Carve the layers of a model in order; yield (index, tensors to store, figures) of each.

    The arithmetic is float32 whatever the precision of the checkpoint, which the stored tensors
    keep. Iterate under `torch.no_grad()`. Raises `CMoEError` if activations are not finite.
    """

    source: Source
    layers: LayerWalk
    """The dense model's."""
    streams: Streams
    """Before layer `first`, and after each step before the next one."""
    config: CMoEConfig
    """Of the carved model."""
    recipe: Recipe
    storage: Storage
    k_act: int
    """Neurons marked per token."""
    first: int = 0

    def __post_init__(self) -> None:
        self.arch = self.source.architecture

    def __iter__(self) -> Iterator[tuple[int, dict[str, torch.Tensor], dict[str, Any]]]:
        for index in range(self.first, self.config.num_hidden_layers):
            yield index, *self.carve(index)

    @abstractmethod
    def carve(self, index: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Carve a layer and advance the streams; return tensors to store, and figures."""


def windows_at_once(length: int) -> int:
    """Return how many windows of `length` tokens pass through a layer at once."""
    return max(1, BATCH_TOKENS // length)


def record_batches(layers: LayerWalk, windows: int, length: int) -> None:
    """Find out how the layers are called, for the proof of each and for `batches_of` windows."""
    batches = torch.empty(windows, device="meta").split(windows_at_once(length))
    for size in {len(batch) for batch in batches}:
        layers.record(size, length)
    layers.record(1, min(PROOF_TOKENS, length))


def batches_of(hidden_WLH: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield some windows (B, L, H) at a time, with their tokens."""
    length = hidden_WLH.shape[1]
    step = windows_at_once(length)
    for first, batch_BLH in zip(
        range(0, len(hidden_WLH), step), hidden_WLH.split(step), strict=True
    ):
        yield slice(first * length, (first + len(batch_BLH)) * length), batch_BLH


def attend(
    layers: LayerWalk, hidden_WLH: torch.Tensor, residual_WLH: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Run a layer without its FFN on all windows; yield slices of tokens with their FFN inputs.

    What leaves the layer is written to `residual_WLH`, which may be the hidden states themselves.
    """
    residual_TH = residual_WLH.flatten(0, 1)
    for tokens, batch_BLH in batches_of(hidden_WLH):
        residual_BLH, x_TH = layers.ffn_input(batch_BLH)
        residual_TH[tokens] = residual_BLH.flatten(0, 1)
        yield tokens, x_TH


def run_layer(layers: LayerWalk, hidden_WLH: torch.Tensor, output: Output) -> None:
    """Run a layer on all windows, in place, with `output(tokens, x)` as what its FFN returns."""
    for tokens, batch_BLH in batches_of(hidden_WLH):
        batch_BLH.copy_(layers(batch_BLH, partial(output, tokens)))


def run_dense_layer(ffn: FFN, layers: LayerWalk, hidden_WLH: torch.Tensor) -> None:
    """Run the dense layer on all windows, in place."""
    run_layer(layers, hidden_WLH, lambda _, x_TH: ffn.output(ffn.hidden(x_TH)))


def profile_layer(
    ffn: FFN,
    inputs: Iterable[tuple[slice, torch.Tensor]],
    profile: Profile,
    *,
    cosine: bool,
    clock: Stopwatch,
) -> bool:
    """Fill `profile` with what the FFN does on the inputs that `attend` yields.

    Returns whether all activations are finite.
    """
    all_finite, k_act = True, profile.marks_TK.shape[1]
    with clock("forward"):
        for tokens, x_BH in inputs:
            profile.x_TH[tokens] = x_BH
            h_BF, profile.marks_TK[tokens], is_finite = ffn.profile(
                profile.x_TH[tokens], k_act, cosine=cosine, clock=clock
            )
            kept_BF = profile.h_TF[tokens]  # of the last batch perhaps a part, of later ones none
            kept_BF.copy_(h_BF[: len(kept_BF)])
            all_finite &= is_finite
    return all_finite


def dense_output(ffn: FFN, profile: Profile) -> torch.Tensor:
    """Return the output of the dense FFN, (T, H)."""
    if len(profile.h_TF) == len(profile.x_TH):
        return ffn.output(profile.h_TF)
    return torch.cat([ffn.output(ffn.hidden(x_BH)) for x_BH in profile.x_TH.split(BATCH_TOKENS)])


def with_totals(seconds: Mapping[str, float], tokens: int) -> dict[str, float]:
    """Return each step's seconds, and those of the bare forward pass and of the carving pass.

    The bare forward pass is attention, gate and up as run, plus the dense down projection, timed
    on a sample and scaled to all tokens.
    """
    down = seconds.get("dense_down_sample", 0.0)
    bare = seconds["forward"] + down * tokens / min(tokens, BATCH_TOKENS)
    carving = sum(value for name, value in seconds.items() if name != "read")
    return {**seconds, "bare_forward": bare, "carving_pass": carving}
