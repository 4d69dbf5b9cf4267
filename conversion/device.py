# SPDX-License-Identifier: Apache-2.0
"""Where and in which precision to compute, and how much memory that took."""

import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
import transformers

import cmoe_hf

from .errors import RequestError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_device(device: str | None) -> torch.device:
    """Return the named device, or the accelerator if there is one. Raises `RequestError`."""
    if device is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    if "," in device:
        raise RequestError(
            f"--device is {device}, but a conversion uses one device: every layer is profiled on "
            "what the carved layers before it produce. Run one conversion on each device."
        )
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        reason = str(error).splitlines()[0]
        raise RequestError(f"device {device!r} cannot be used: {reason}") from error
    return chosen


def device_name(device: torch.device) -> str:
    """Return what the hardware calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if device.type == "cpu" and cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return f"{device.type} {platform.processor()}".strip()


def versions() -> dict[str, str]:
    """Return what a figure or a conversion was made with."""
    return {
        "cmoe_hf": cmoe_hf.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free where a device keeps its tensors."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak resident memory of the process, plus that of the GPU if one was used."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count the parent's memory: Linux keeps it across exec
        found = re.search(r"VmHWM:\s*(\d+)", status.read_text(encoding="utf-8"))
        peak = int(found[1]) * 1024 if found else 0
    elif sys.platform == "darwin":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    else:
        peak = getattr(psutil.Process().memory_info(), "peak_wset")  # noqa: B009 - of Windows
    return peak + (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)


def name_of(dtype: torch.dtype) -> str:
    """Return, for example, `float32`."""
    return str(dtype).removeprefix("torch.")


def best_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the shortest of several runs after a first one; of fewer if they take long."""
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < 12 and sum(seconds) < 1):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Stopwatch:
    """Seconds spent under each name. Of two names within each other, the inner one counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._within = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what is done within."""
        outside, self._within, start = self._within, 0.0, self._now()
        yield
        passed = self._now() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + passed - self._within
        self._within = outside + passed

    def _now(self) -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()
