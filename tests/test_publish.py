# SPDX-License-Identifier: Apache-2.0
"""Publishing: what arrives on the Hub is what was here, whatever happens on the way."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hub import EXPIRED, TOKEN, Fault
from refusal import refused
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cmoe_hf.conversion import CMoEError, RequestError, export, publish
from cmoe_hf.conversion.cli import app

STATED = {"licence": "apache-2.0", "base_model": "org/dense"}
OPTIONS = ("--license", "mit", "--base-model", "org/dense")
NAME = "org/carved"
SHARD = "model-00002-of-00002.safetensors"

FROM_THE_HUB = """
import sys
sys.modules["cmoe_hf"] = None  # any import of it fails
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
name, again, logits_file = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
ids = torch.arange(2, 34).view(2, 16)
with torch.no_grad():
    logits = model(ids).logits
text = AutoTokenizer.from_pretrained(name).decode(model.generate(ids, max_new_tokens=4)[0])
model.push_to_hub(again)
with torch.no_grad():
    pushed = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
    assert torch.equal(pushed(ids).logits, logits)
    AutoModel.from_pretrained(again, trust_remote_code=True)
torch.save((logits, text), logits_file)
"""


@pytest.fixture
def online(hub, monkeypatch):
    """The loopback Hub, empty, with a token that may write."""
    hub.reset()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.reset()


@pytest.fixture
def folder(dense, carve, tmp_path):
    """A carved model in two shards that a test may damage."""
    return shutil.copytree(carve(dense, max_shard_size="600KB"), tmp_path / "mine")


def contents(folder):
    """Name and bytes of every file."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def on_the_hub(hub, revision="main", name=NAME):
    """Name and bytes of every file of a repository."""
    files = dict(hub.repositories[name].files(revision))
    files.pop(".gitattributes", None)
    return files


def test_it_loads_by_id_where_this_package_is_not(online, folder, tmp_path):
    sent = len(contents(folder))
    (folder / ".env").write_text(f"HF_TOKEN={TOKEN}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "notes.md").write_text(TOKEN)
    result = publish(folder, NAME, **STATED)
    here = contents(folder)
    assert on_the_hub(online) == {name: here[name] for name in here if not name.startswith(".")}
    card = here["README.md"].decode()
    assert "license: apache-2.0" in card and "base_model: org/dense" in card
    assert "As stated by the publisher: `apache-2.0`" in card and "states no licence" not in card
    assert online.repositories[NAME].private and result.private
    assert result.commit == online.repositories[NAME].branches["main"]
    assert result.url.endswith(NAME) and result.files == sent
    done = subprocess.run(
        [sys.executable, "-c", FROM_THE_HUB, NAME, "org/again", str(tmp_path / "logits.pt")],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    logits, text = torch.load(tmp_path / "logits.pt")
    here = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(here(torch.arange(2, 34).view(2, 16)).logits, logits)
    assert text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "whoami", 429),
        ("POST", "api/repos/create", 500),
        ("POST", "commit", 503),
        ("POST", "commit", 0),
    ],
)
def test_the_same_command_goes_on_where_it_stopped(online, folder, method, path, status):
    online.faults.append(Fault(method, path, status, times=99))
    cause = f"answered {status} to {NAME}" if status else f"upload to {NAME} broke off"
    with pytest.raises(CMoEError, match=f"{cause}.* Run the same command again"):
        publish(folder, NAME, **STATED)
    online.faults.clear()
    if path == "commit":  # the weights have arrived, but nothing half-written can be seen
        assert on_the_hub(online) == {}
        assert len(online.large) == len(list(folder.glob("*.safetensors")))
        online.requests.clear()
    publish(folder, NAME, **STATED)
    assert any(path.startswith("/lfs/") for path in online.requests) == (path != "commit")
    assert on_the_hub(online) == contents(folder)


def test_a_second_time_there_is_no_commit_and_a_token_may_expire_on_the_way(online, folder):
    publish(folder, NAME, **STATED)
    before = dict(online.repositories[NAME].branches)
    result = publish(folder, NAME)
    assert online.repositories[NAME].branches == before and result.replaced == []
    assert result.commit == before["main"]
    (folder / "NOTES.md").write_text("more")
    online.faults.append(Fault("POST", "commit", 401, 9))
    with pytest.raises(RequestError, match="expired or is wrong"):
        publish(folder, NAME)


def test_what_the_hub_has_is_compared(online, folder):
    for name in ("config.json", SHARD):
        online.reset()
        online.spoiled = name
        with pytest.raises(CMoEError, match=f"does not have what was sent: {name}"):
            publish(folder, NAME, **STATED)


def run(*arguments):
    return CliRunner().invoke(app, ["publish", *map(str, arguments), "--json"])


@pytest.mark.parametrize(
    ("token", "name", "phrase"),
    [
        (EXPIRED, NAME, "expired or is wrong"),
        ("", NAME, "none was found"),
        (TOKEN, "somebody/carved", "may not write to somebody/carved"),
        (TOKEN, "org/..", "not a valid name"),
        (TOKEN, "carved", "give OWNER/NAME"),
    ],
)
def test_whom_the_hub_refuses(online, folder, monkeypatch, token, name, phrase):
    monkeypatch.setenv("HF_TOKEN", token)
    result = run(folder, name, *OPTIONS)
    refused(result, 2, phrase)
    assert online.repositories == {}


def test_files_of_another_model_are_not_mixed_with_this_one(online, folder, dense):
    online.publish(NAME, dense)
    files = online.repositories[NAME].files()
    files["images/plot.png"] = b"picture"
    files["NOTES.md"] = b"mine"
    result = run(folder, NAME, *OPTIONS)
    refused(result, 2, "model.safetensors", "--replace")
    assert online.repositories[NAME].files() is files
    published = publish(folder, NAME, replace=True, **STATED)
    there = on_the_hub(online)
    assert there.pop("images/plot.png") == b"picture" and there.pop("NOTES.md") == b"mine"
    assert there == contents(folder)
    assert published.deleted == ["model.safetensors"] and "config.json" in published.replaced
    assert published.left == ["NOTES.md", "images/plot.png"]
    assert not published.private  # it was public before


def test_a_dry_run_sends_nothing(online, folder):
    before = contents(folder)
    result = publish(folder, NAME, dry_run=True, **STATED)
    assert result.dry_run and result.commit is None and result.private
    assert online.repositories == {} and contents(folder) == before


def test_branches_and_pull_requests(online, folder):
    publish(folder, NAME, **STATED)
    main = online.repositories[NAME].branches["main"]
    (folder / "NOTES.md").write_text("more")
    result = publish(folder, NAME, revision="v2")
    assert result.url.endswith("/tree/v2") and "NOTES.md" in on_the_hub(online, "v2")
    result = publish(folder, NAME, pull_request=True)
    assert result.revision == "refs/pr/1" and result.url.endswith("/discussions/1")
    assert "NOTES.md" in on_the_hub(online, "refs/pr/1")
    assert online.repositories[NAME].branches["main"] == main
    with pytest.raises(RequestError, match="either --pr or --revision"):
        publish(folder, NAME, revision="v2", pull_request=True)


def test_an_exported_model_is_published_too(online, folder, tmp_path):
    export(folder, tmp_path / "native")
    publish(tmp_path / "native", NAME, **STATED)
    assert on_the_hub(online) == contents(tmp_path / "native")
    assert AutoModelForCausalLM.from_pretrained(NAME).config.model_type == "granitemoeshared"


def without_tensor(folder):
    tensors = load_file(folder / SHARD)
    tensors.popitem()
    save_file(tensors, folder / SHARD)


def without_auto_model(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]["AutoModel"]
    (folder / "config.json").write_text(json.dumps(config))


def unfinished(folder):
    (folder / "work").mkdir()
    (folder / "work" / "settings.json").write_text("{}")


def append(name, content):
    return lambda folder: (folder / name).open("ab").write(content)


def remove(name):
    return lambda folder: (folder / name).unlink()


UNFIT = {
    "needs a card": remove("README.md"),
    "modeling_cmoe.py is missing": remove("modeling_cmoe.py"),
    "not the file whose SHA-256 the card": append("modeling_cmoe.py", b"\nimport os\n"),
    f"shard {SHARD} is missing": remove(SHARD),
    "corrupt or truncated": lambda folder: os.truncate(folder / SHARD, 5000),
    "model.safetensors is not a shard of this model": lambda folder: save_file(
        {"x": torch.ones(1)}, folder / "model.safetensors"
    ),
    "names 1 tensors that no shard has": without_tensor,
    "has no tokenizer": remove("tokenizer.json"),
    "unfinished work": unfinished,
    "optimizer.pt: pickled files run code": append("optimizer.pt", b""),
    "no entry of its own for AutoModel": without_auto_model,
}
"""How a folder becomes unfit, by what the refusal says."""


@pytest.mark.parametrize("phrase", UNFIT)
def test_an_unfit_folder_is_refused_before_anything_is_sent(online, folder, phrase):
    UNFIT[phrase](folder)
    refused(run(folder, NAME, *OPTIONS), 2, phrase)
    assert online.requests == []


def test_what_does_not_load_or_has_a_path_in_its_metadata_is_not_published(online, folder):
    path = folder / SHARD
    tensors = load_file(path)
    save_file(tensors, path, metadata={"format": "pt", "from": "/home/jane/llama"})
    refused(run(folder, NAME, *OPTIONS), 2, "local path")
    tensors[next(iter(tensors))] = torch.zeros(3)
    save_file(tensors, path)
    with pytest.raises(CMoEError, match="cannot be run under"):
        publish(folder, NAME, **STATED)
    assert online.requests == []


def test_licence_and_base_model_must_be_stated(online, folder):
    refused(run(folder, NAME, "--base-model", "org/dense"), 2, "states no licence", "--license")
    refused(run(folder, NAME, "--license", "mit"), 2, "no Hub id", "--base-model")
    refused(run(folder / "absent", NAME), 2, "there is no folder")


@pytest.mark.parametrize(
    ("name", "text", "phrase"),
    [
        ("NOTES.md", "token: hf_" + "Ab1" * 11 + "x", "a Hugging Face token in line 2"),
        ("run.log", TOKEN, "token in line 2"),
        ("notes/a.json", '"cache": "/srv/models/llama"', "a local path in line 2"),
        ("NOTES.md", "see /home/jane/llama", "a local path in line 2"),
        ("NOTES.md", r"C:\Users\jane\llama", "a local path in line 2"),
        ("NOTES.md", "made by janedoe, thanks", "your user name in line 2"),
        ("NOTES.md", "in /srv/people/me/models", "a local path in line 2"),
        ("key.txt", "-----BEGIN OPENSSH PRIVATE KEY-----", "a private key in line 2"),
    ],
)
def test_nothing_private_is_published(online, folder, monkeypatch, name, text, phrase):
    monkeypatch.setenv("LOGNAME", "janedoe")
    monkeypatch.setenv("HOME", "/srv/people/me")
    (folder / "notes").mkdir()
    (folder / name).write_text(f"first\n{text}\n")
    refused(run(folder, NAME, *OPTIONS), 2, name, phrase)
    assert online.requests == []


def test_a_card_whose_metadata_cannot_be_read_gets_what_the_publisher_states(online, folder):
    (folder / "README.md").write_text("---\nlicense: [mit\nbase: {\n---\nHello\n")
    with pytest.raises(RequestError, match="states no licence"):
        publish(folder, NAME)
    publish(folder, NAME, **STATED)
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card and "Hello" in card


def test_the_code_of_a_tokenizer_must_be_trusted(online, folder):
    (folder / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    path = folder / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": [None, "tokenization_own.Own"]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    with pytest.raises(RequestError, match="trust-remote-code"):
        publish(folder, NAME, **STATED)
    publish(folder, NAME, **STATED, trust_remote_code=True)
    assert (
        on_the_hub(online)["tokenization_own.py"] == (folder / "tokenization_own.py").read_bytes()
    )


def test_saving_with_an_upload_takes_the_code_along(online, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id=NAME)
    code = {"configuration_cmoe.py", "modeling_cmoe.py", "triton_cmoe.py"}
    assert code <= on_the_hub(online).keys() and code <= contents(tmp_path / "saved").keys()
