# SPDX-License-Identifier: Apache-2.0
"""Runs one dense decoder layer on the calibration windows and watches its FFN.

Shape suffixes: W windows, L tokens of one window, T = W * L tokens, H hidden size, F dense FFN
width, G = F, or F + 1 with an output bias, K marked neurons per token.
"""

import errno
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self

import torch

from ..errors import CMoEError
from ..source.library import AttentionHalf
from .profile import activation_marks, activations, cosines

BATCH_TOKENS = 2048
"""Tokens that cross a layer at once."""
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

    @property
    def tokens(self) -> int:
        """Number of calibration tokens."""
        return self.carved_WLH.shape[0] * self.carved_WLH.shape[1]


@dataclass
class FFN:
    """A dense FFN in float32: y = h downᵀ + down_bias with h = act(x gateᵀ) * (x upᵀ), or
    h = act(x upᵀ + up_bias) where there is no gate."""

    gate_FH: torch.Tensor | None
    up_FH: torch.Tensor
    down_HF: torch.Tensor
    act: Callable[[torch.Tensor], torch.Tensor]
    stored_dtype: torch.dtype
    """Precision of the checkpoint: what is derived is rounded to it before it is used, so that
    calibration sees what inference will see."""
    up_bias_F: torch.Tensor | None = None
    down_bias_H: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """Neurons, F."""
        return len(self.up_FH)

    @property
    def is_biased(self) -> bool:
        """Whether the output has a bias."""
        return self.down_bias_H is not None

    @cached_property
    def down_with_bias(self) -> torch.Tensor:
        """The down projection, (H, G): its bias is the column of a neuron that is always 1."""
        if self.down_bias_H is None:
            return self.down_HF
        return torch.cat([self.down_HF, self.down_bias_H.unsqueeze(1)], dim=1)

    def products(self, x_TH: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """x gateᵀ and x upᵀ + up_bias, (T, F) each."""
        up_TF = x_TH @ self.up_FH.T
        if self.up_bias_F is not None:
            up_TF += self.up_bias_F
        return (None if self.gate_FH is None else x_TH @ self.gate_FH.T), up_TF

    def hidden(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Hidden activations, (T, F)."""
        return activations(*self.products(x_TH), self.act)

    def cosine_hidden(
        self, x_TH: torch.Tensor, gate_TF: torch.Tensor | None, up_TF: torch.Tensor
    ) -> torch.Tensor:
        """The same with products of lengths 1, (T, F), see `profile.cosines`."""
        if self.gate_FH is not None and gate_TF is not None:
            gate_TF = cosines(gate_TF, x_TH, self.gate_FH)
        up_TF = cosines(up_TF, x_TH, self.up_FH, self.up_bias_F)
        return activations(gate_TF, up_TF, self.act)

    def output(self, h_TF: torch.Tensor) -> torch.Tensor:
        """y of some hidden activations, (T, H)."""
        y_TH = h_TF @ self.down_HF.T
        return y_TH if self.down_bias_H is None else y_TH + self.down_bias_H

    def rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        """A derived weight as it will be loaded, in float32."""
        return tensor.to(self.stored_dtype).float()


@dataclass
class Profile:
    """What the calibration tokens do in one FFN. Overwritten layer by layer: the buffers are the
    largest thing in memory, and touching new ones costs as much as some of the arithmetic."""

    x_TH: torch.Tensor
    """Inputs."""
    h_TF: torch.Tensor
    """Hidden activations."""
    marks_TK: torch.Tensor
    """Indices of the marked neurons, on the CPU."""

    @classmethod
    def empty(cls, tokens: int, hidden: int, width: int, k: int, storage: Storage) -> Self:
        """Buffers for `tokens` tokens."""
        return cls(
            x_TH=storage.empty("inputs", tokens, hidden),
            h_TF=storage.empty("hidden", tokens, width),
            marks_TK=torch.empty(tokens, k, dtype=torch.int64),
        )

    def part(self, tokens: slice) -> Self:
        """A view of some of the tokens."""
        return type(self)(self.x_TH[tokens], self.h_TF[tokens], self.marks_TK[tokens])

    def is_finite(self) -> bool:
        """No NaN and no infinity: ATopK takes them for the largest, so the marked tell it all."""
        marked_TK = self.h_TF.gather(1, self.marks_TK.to(self.h_TF.device))
        return bool(torch.isfinite(marked_TK).all())


@dataclass
class Stopwatch:
    """Seconds spent under each name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def report(self, tokens: int) -> dict[str, float]:
        """Each step's seconds, and the two that count: bare forward pass and carving pass.

        The bare forward pass is attention, gate and up as run, plus the dense down projection,
        timed on a sample and scaled to all tokens.
        """
        sample = min(tokens, BATCH_TOKENS)
        down = self.seconds.get("dense_down_sample", 0.0)
        bare = self.seconds["forward"] + down * tokens / sample
        carving = sum(value for name, value in self.seconds.items() if name != "read")
        return {**self.seconds, "bare_forward": bare, "carving_pass": carving}


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
    length = hidden_WLH.shape[1]
    k = profile.marks_TK.shape[1]
    step = max(1, BATCH_TOKENS // length)
    rows = zip(
        hidden_WLH.split(step),
        profile.x_TH.split(step * length),
        profile.h_TF.split(step * length),
        profile.marks_TK.split(step * length),
        strict=True,
    )
    for batch_WLH, x_TH, h_TF, marks_TK in rows:
        with clock("forward"):
            residual_WLH, x_WLH = attention(batch_WLH)
            batch_WLH.copy_(residual_WLH)
            x_TH.copy_(x_WLH.flatten(0, 1))
            products = ffn.products(x_TH)
            h_TF.copy_(activations(*products, ffn.act))
        with clock("marks"):
            signal_TF = ffn.cosine_hidden(x_TH, *products) if cosine else h_TF
            marks_TK.copy_(activation_marks(signal_TF, k))


def attend(attention: AttentionHalf, hidden_WLH: torch.Tensor, x_TH: torch.Tensor) -> None:
    """Run attention on all windows, in place, and keep what the FFN sees."""
    length = hidden_WLH.shape[1]
    step = max(1, BATCH_TOKENS // length)
    rows = zip(hidden_WLH.split(step), x_TH.split(step * length), strict=True)
    for batch_WLH, batch_TH in rows:
        residual_WLH, x_WLH = attention(batch_WLH)
        batch_WLH.copy_(residual_WLH)
        batch_TH.copy_(x_WLH.flatten(0, 1))


def run_dense_layer(ffn: FFN, attention: AttentionHalf, hidden_WLH: torch.Tensor) -> None:
    """Run the dense layer on all windows, in place."""
    for batch_WLH in hidden_WLH.split(max(1, BATCH_TOKENS // hidden_WLH.shape[1])):
        residual_WLH, x_WLH = attention(batch_WLH)
        batch_WLH.copy_(residual_WLH + ffn.output(ffn.hidden(x_WLH)))
