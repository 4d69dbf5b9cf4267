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

import pytest
from refusal import refused
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from cmoe_hf.conversion.cli import app

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


@pytest.fixture(scope="module")
def server(folder):
    """Its URL; interrupted at the end, it must leave in peace."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "cmoe_hf.conversion.cli", "serve", str(folder)),
            *("--host", "127.0.0.1", "--port", str(port)),
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
    yield f"http://127.0.0.1:{port}/v1"
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in output, output


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server, api_key="none", max_retries=0, timeout=60) as client:
        yield client


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


def test_completion_and_chat_equal_generate(client, folder, expected):
    for prompt in PROMPTS[:2]:
        completion = ask(client, folder, prompt)
        assert completion.choices[0].text == expected[prompt]
        assert completion.usage.completion_tokens == 12
        assert chat(client, folder, prompt).choices[0].message.content == expected[prompt]


def test_streams_are_the_same_text_in_pieces(client, folder, expected):
    prompt = PROMPTS[0]
    texts = [part.choices[0].text for part in ask(client, folder, prompt, stream=True)]
    parts = [part.choices for part in chat(client, folder, prompt, stream=True)]
    for pieces in (texts, [choices[0].delta.content for choices in parts if choices]):
        assert "".join(filter(None, pieces)) == expected[prompt] and len(pieces) > 3


def test_five_clients_at_once(server, folder, expected):
    def one(prompt):
        with openai.OpenAI(base_url=server, api_key="none", timeout=60) as client:
            texts = [ask(client, folder, prompt).choices[0].text]
            stream = chat(client, folder, prompt, stream=True)
            parts = [part.choices[0].delta.content for part in stream if part.choices]
            return [*texts, "".join(filter(None, parts))]

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(one, PROMPTS))
    assert answers == [[expected[prompt]] * 2 for prompt in PROMPTS]


def test_it_says_what_it_serves(client, folder):
    assert [model.id for model in client.models.list()] == [str(folder)]
    with pytest.raises(openai.BadRequestError):
        ask(client, "another", PROMPTS[0])


def test_bad_requests(tmp_path, dense_copy):
    def invoke(model, *options):
        return CliRunner().invoke(app, ["serve", str(model), *options])

    refused(invoke(tmp_path / "absent"), 2, "neither a folder nor the id")
    refused(invoke("org/name@main"), 2, "takes what follows an @ for a revision")
    refused(invoke(dense_copy, "--nonsense"), 2, "No such option")
    (dense_copy / "tokenizer.json").unlink()
    refused(invoke(dense_copy), 2, "has no tokenizer")
