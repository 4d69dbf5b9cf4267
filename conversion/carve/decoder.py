# SPDX-License-Identifier: Apache-2.0
"""Runs one dense decoder layer on the calibration windows and watches its FFN.

Shape suffixes: W windows, L tokens of one window, T = W * L tokens, B of a part of them, H hidden
size, F dense FFN width, K marked neurons per token.
"""

import errno
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from ..device import Stopwatch
from ..errors import CMoEError
from ..source.library import AttentionHalf
from .layer import FFN, Profile, all_finite
from .partition import Partition
from .profile import activation_marks, activations
from .refit import Running

BATCH_TOKENS = 2048
"""Tokens that cross a layer at once."""
PROFILED_TOKENS = 16_384
"""Tokens whose hidden activations are kept: enough for clusters and routers."""
CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
"""How file systems without `fallocate` say so, and C libraries that try to do without it."""


@dataclass(frozen=True)
class Storage:
    """Where the activations of all calibration tokens are kept."""

    device: torch.device
    folder: Path | None = None
    """Map them from files in this folder instead of keeping them on the device."""

    def empty(self, name: str, *shape: int) -> torch.Tensor:
        """An uninitialised float32 tensor. Raises `CMoEError` if the disk has no room for it."""
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
    """Put room behind a sparse file: without it, a write to a mapped page would kill the process.

    Where the system or the file system cannot reserve any, the room must be free at least. Raises
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
    """Hidden states of the calibration windows entering a layer, (W, L, H), changed in place."""

    carved_WLH: torch.Tensor
    """Behind the carved layers so far."""
    dense_WLH: torch.Tensor | None
    """Behind the dense ones; None for a recipe that does not correct errors."""

    @classmethod
    def embedded(
        cls, embedding_VH: torch.Tensor, windows_WL: torch.Tensor, storage: Storage, *, dense: bool
    ) -> Self:
        """What enters the first layer; with a dense stream if `dense`."""
        hidden_WLH = embedding_VH[windows_WL].float()
        names = ("carved", "dense") if dense else ("carved",)
        return cls.restored(dict.fromkeys(names, hidden_WLH), storage)

    @classmethod
    def restored(cls, states: dict[str, torch.Tensor], storage: Storage) -> Self:
        """The inverse of `saved`."""
        kept = {name: storage.empty(name, *value.shape) for name, value in states.items()}
        for name, value in states.items():
            kept[name].copy_(value)
        return cls(kept["carved"], kept.get("dense"))

    def saved(self) -> dict[str, torch.Tensor]:
        """The states by name."""
        states = {"carved": self.carved_WLH, "dense": self.dense_WLH}
        return {name: value for name, value in states.items() if value is not None}

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.saved().values())

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.carved_WLH.shape[1]

    @property
    def tokens(self) -> int:
        """Calibration tokens, of all windows."""
        return len(self.carved_WLH) * self.length


def attend(
    attention: AttentionHalf, hidden_WLH: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Run attention on all windows, in place; yield some of the tokens at a time, and the FFN
    input (B, H) of these."""
    length = hidden_WLH.shape[1]
    step = max(1, BATCH_TOKENS // length)
    for first, batch_WLH in zip(
        range(0, len(hidden_WLH), step), hidden_WLH.split(step), strict=True
    ):
        residual_WLH, x_WLH = attention(batch_WLH)
        batch_WLH.copy_(residual_WLH)
        x_BH = x_WLH.flatten(0, 1)
        yield slice(first * length, first * length + len(x_BH)), x_BH


def profile_layer(
    ffn: FFN,
    attention: AttentionHalf,
    hidden_WLH: torch.Tensor,
    profile: Profile,
    *,
    cosine: bool,
    clock: Stopwatch,
) -> None:
    """Run attention on all windows, in place, and fill `profile` with what comes out of it."""
    profile.is_finite = True
    with clock("forward"):
        for tokens, x_BH in attend(attention, hidden_WLH):
            profile.x_TH[tokens] = x_BH
            products = ffn.products(profile.x_TH[tokens])
            h_BF = activations(*products, ffn.act)
            kept_BF = profile.h_TF[tokens]  # of the last batch perhaps a part, of later ones none
            kept_BF.copy_(h_BF[: len(kept_BF)])
            with clock("marks"):
                signal_BF = ffn.cosine_hidden(x_BH, *products) if cosine else h_BF
                marks_BK = activation_marks(signal_BF, profile.k_act)
                profile.is_finite &= all_finite(h_BF, marks_BK)
                profile.marks_TK[tokens] = marks_BK


def sparse_output(
    ffn: FFN,
    down_HG: torch.Tensor,
    parts: Partition,
    run_TN: torch.Tensor,
    x_TH: torch.Tensor,
    h_TF: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the output of the sparse FFN, (T, H) (paper, eq. 2).

    Its hidden activations are `h_TF`, or made for some tokens at a time.
    """
    running = Running.of(parts, run_TN)
    down_HR, y_TH = down_HG[:, running.neurons_R], torch.empty_like(x_TH)
    for start in range(0, len(x_TH), BATCH_TOKENS):
        tokens = slice(start, start + BATCH_TOKENS)
        h_BF = ffn.hidden(x_TH[tokens]) if h_TF is None else h_TF[tokens]
        z_BR = running.idle_zeroed(h_BF[:, running.neurons_R], run_TN[tokens])
        y_TH[tokens] = z_BR @ down_HR.T
    return y_TH + down_HG[:, -1] if ffn.is_biased else y_TH


def dense_output(ffn: FFN, profile: Profile) -> torch.Tensor:
    """Output of the dense FFN, (T, H)."""
    if len(profile.h_TF) == len(profile.x_TH):
        return ffn.output(profile.h_TF)
    return torch.cat([ffn.output(ffn.hidden(x_BH)) for x_BH in profile.x_TH.split(BATCH_TOKENS)])


def run_dense_layer(ffn: FFN, attention: AttentionHalf, hidden_WLH: torch.Tensor) -> None:
    """Run the dense layer on all windows, in place."""
    hidden_TH = hidden_WLH.flatten(0, 1)
    for tokens, x_BH in attend(attention, hidden_WLH):
        hidden_TH[tokens] += ffn.output(ffn.hidden(x_BH))


def with_totals(seconds: Mapping[str, float], tokens: int) -> dict[str, float]:
    """Each step's seconds, and the two that count: bare forward pass and carving pass.

    The bare forward pass is attention, gate and up as run, plus the dense down projection,
    timed on a sample and scaled to all tokens.
    """
    down = seconds.get("dense_down_sample", 0.0)
    bare = seconds["forward"] + down * tokens / min(tokens, BATCH_TOKENS)
    carving = sum(value for name, value in seconds.items() if name != "read")
    return {**seconds, "bare_forward": bare, "carving_pass": carving}
