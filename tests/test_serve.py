# SPDX-License-Identifier: Apache-2.0
"""Serving: the client library that everybody uses, against a server in a process of its own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from refusal import refused
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from cmoe_hf.conversion import RequestError
from cmoe_hf.conversion.cli import app
from cmoe_hf.conversion.measure.llama_cpp import find_server

openai = pytest.importorskip("openai")

pytestmark = pytest.mark.library

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
PROMPTS = [
    "The following methods are defined for",
    "A mapping object maps",
    "The class statement",
    "If the expression",
    "Strings are immutable sequences of",
]


@pytest.fixture(scope="module")
def folder(embedded, carve, tmp_path_factory):
    """The embedded default, carved, with a chat template."""
    folder = tmp_path_factory.mktemp("served") / "out"
    options = {"samples": 16, "sequence_length": 256, "dtype": "float32"}
    shutil.copytree(carve(embedded, (2, 2, 8), **options), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@contextmanager
def served(folder, *options):
    """Serve in a process of its own, and give its URL. Interrupted, it must leave in peace."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "cmoe_hf.conversion.cli", "serve", str(folder)),
            *("--host", "127.0.0.1", "--port", str(port), *options),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.2)
    assert process.poll() is None, process.communicate()[0]
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in output, output


@pytest.fixture(scope="module")
def server(folder):
    with served(folder) as url:
        yield url


@pytest.fixture(scope="module")
def expected(folder):
    """What greedy decoding adds to a prompt, by the library alone."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def complete(prompt):
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, do_sample=False, max_new_tokens=12)
        return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    return {prompt: complete(prompt) for prompt in PROMPTS}


def ask(client, folder, prompt, **options):
    return client.completions.create(
        model=str(folder), prompt=prompt, max_tokens=12, temperature=0, **options
    )


def chat(client, folder, prompt, **options):
    return client.chat.completions.create(
        model=str(folder),
        messages=[{"role": "user", "content": prompt}],
        max_tokens=12,
        temperature=0,
        **options,
    )


def test_five_clients_at_once_get_what_generate_says(server, folder, expected):
    def one(prompt):
        with openai.OpenAI(base_url=server, api_key="none", timeout=60) as client:
            whole = ask(client, folder, prompt)
            assert whole.usage.completion_tokens == 12
            parts = [part.choices[0].text for part in ask(client, folder, prompt, stream=True)]
            stream = chat(client, folder, prompt, stream=True)
            deltas = [part.choices[0].delta.content for part in stream if part.choices]
            assert len(parts) > 3 and len(deltas) > 3
            answer = chat(client, folder, prompt).choices[0].message.content
            pieces = ("".join(filter(None, it)) for it in (parts, deltas))
            return [whole.choices[0].text, answer, *pieces]

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(one, PROMPTS))
    assert answers == [[expected[prompt]] * 4 for prompt in PROMPTS]


def test_it_says_what_it_serves(server, folder):
    with openai.OpenAI(base_url=server, api_key="none", max_retries=0, timeout=60) as client:
        assert [model.id for model in client.models.list()] == [str(folder)]
        with pytest.raises(openai.BadRequestError):
            ask(client, "another", PROMPTS[0])


@pytest.mark.thorough
def test_llama_cpp_answers_a_chat(folder, expected):
    try:
        find_server()
    except RequestError as reason:
        pytest.skip(str(reason))
    prompt = PROMPTS[2]
    with (
        served(folder, "--engine", "llama.cpp", "-c", "256") as url,
        openai.OpenAI(base_url=url, api_key="none", max_retries=60) as client,
    ):
        answer = chat(client, folder, prompt).choices[0].message.content
        assert answer == expected[prompt]
        assert [model.id for model in client.models.list()] == [str(folder)]


def test_bad_requests(tmp_path, dense_copy):
    def invoke(model, *options):
        return CliRunner().invoke(app, ["serve", str(model), *options])

    refused(invoke(tmp_path / "absent"), 2, "neither a folder nor the id")
    refused(invoke("x", "--engine", "ollama"), 2, "no engine 'ollama'")
    gguf = tmp_path / "x.gguf"
    refused(invoke(gguf, "--engine", "llama.cpp"), 2, "there is no file")
    refused(invoke("org/name@main"), 2, "takes what follows an @ for a revision")
    refused(invoke(dense_copy, "--nonsense"), 2, "No such option")
    (dense_copy / "tokenizer.json").unlink()
    refused(invoke(dense_copy), 2, "has no tokenizer")
