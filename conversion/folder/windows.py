# SPDX-License-Identifier: Apache-2.0
"""The token windows that unfinished work began with: no text is read a second time."""

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from ..errors import CMoEError
from .unfinished import PartialFolder

WINDOWS = "windows.safetensors"


def keep_windows(work: PartialFolder, **windows: torch.Tensor) -> None:
    """Write the windows that unfinished work began with, so that no text is read again."""
    kept = {name: window_WL.contiguous() for name, window_WL in windows.items()}
    work.replace(work.private / WINDOWS, lambda new: save_file(kept, new))


def kept_windows(work: PartialFolder) -> dict[str, torch.Tensor] | None:
    """What `keep_windows` wrote; None if the process died before. Raises `CMoEError` if it is
    damaged."""
    path = work.private / WINDOWS
    if not path.is_file():
        return None
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise CMoEError(
            f"{WINDOWS} of the unfinished {work.noun} is damaged: it cannot be resumed. Start "
            "again with --overwrite."
        ) from error
