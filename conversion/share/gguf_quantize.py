# SPDX-License-Identifier: Apache-2.0
"""Types of numbers that llama.cpp's own `llama-quantize` makes of a GGUF file."""

import re
import shlex
import subprocess
from collections import deque
from pathlib import Path

import torch
from tqdm import tqdm

from ..errors import CMoEError, RequestError
from ..measure.llama_cpp import find_program

PROGRAM = "llama-quantize"
WHOLE = {torch.float16: "f16", torch.bfloat16: "bf16"}
"""Types of the file that it reads, which loses nothing; f32 for a model of another type."""


def find_quantizer(type: str, model: str | Path, output: Path) -> str:
    """Return the program. Raise `RequestError` if there is none or it does not know the type."""
    program = find_program(PROGRAM)
    if program is None:
        whole = str(output.with_suffix(".f16.gguf"))
        export = shlex.join(["cmoe", "export", str(model), "--gguf", whole])
        quantizing = shlex.join([PROGRAM, whole, str(output), type.upper()])
        raise RequestError(
            f"there is no type {type!r} but f32, f16, bf16 and q8_0 without llama.cpp's {PROGRAM} "
            f"in PATH. With one elsewhere: `{export}`, then `{quantizing}`."
        )
    said = subprocess.run([program, "--help"], capture_output=True, text=True)
    known = [it.lower() for it in re.findall(r"\bor\s+(\w+)\s*:", said.stdout + said.stderr)]
    if type.lower() not in known:
        raise RequestError(f"there is no type {type!r}; {program} knows {', '.join(known)}.")
    return program


def quantize(command: list[str], tensors: int) -> dict[str, str]:
    """Run the program; return the tensors that fell back to another type, and to which.

    Raises `CMoEError` with its last words if it fails.
    """
    fallbacks, last = {}, deque[str](maxlen=3)
    bar = tqdm(total=tensors, desc="quantizing", unit="tensor", disable=None)
    program = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    with bar, program as process:
        for line in process.stdout or ():
            bar.update(line.startswith("["))
            if line.strip():
                last.append(line.strip())
            if found := re.search(r"(\S+)\s+- ncols.*falling back to\s+(\w+)", line):
                fallbacks[found[1]] = found[2]
    if process.returncode:
        raise CMoEError(f"{PROGRAM} failed ({process.returncode}): {' / '.join(last)}")
    return fallbacks
