# SPDX-License-Identifier: Apache-2.0
"""Faults reported from the field: each is one clear line now, or works."""

import errno
import json
import os
import shutil

import pytest
import torch
from hub import TOKEN
from killable import interrupted_at
from refusal import refused
from safetensors.torch import load_file, save_file
from test_bad_input import run
from transformers import AutoTokenizer
from transformers.utils import logging
from typer.testing import CliRunner

from cmoe_hf.conversion import CMoEError, Tuning, recover
from cmoe_hf.conversion.carve.decoder import Storage
from cmoe_hf.conversion.cli import app
from cmoe_hf.conversion.embedded import CALIBRATION, HELD_OUT
from cmoe_hf.conversion.share.vetting import check_private
from cmoe_hf.conversion.tune.recover import Recovery


def cli(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("user", ["llama", "model", "hub", "max"])
def test_a_login_that_is_an_ordinary_word_does_not_block(hub, carved, tmp_path, monkeypatch, user):
    hub.reset()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("LOGNAME", user)
    folder = shutil.copytree(carved, tmp_path / "mine")
    (folder / "NOTES.md").write_text(f"The {user} of https://x.org/{user}/a, in lib/{user}/a.py.")
    stated = ("--license", "mit", "--base-model", "org/dense")
    result = cli("publish", folder, "org/carved", *stated, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["dry_run"]


LINES = """\
cache: /data/{}/models
cache: /mnt2/work/{}
see ~{}/notes
D:\\\\Users\\\\{}\\\\x
under \\Users\\{}
file:///srv/{}/x
mail {}@example.org
"user": "{}"
author: {}
user_name = '{}'
"""


@pytest.mark.parametrize("user", ["llama", "janedoe"])
def test_a_login_is_found_where_it_means_the_user(carved, tmp_path, monkeypatch, user):
    monkeypatch.setenv("LOGNAME", user)
    folder = shutil.copytree(carved, tmp_path / "mine")
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    for line in LINES.splitlines():
        (folder / "NOTES.md").write_text(line.format(user))
        message = r"NOTES.md tells (your user name|a local path) in line 1"
        with pytest.raises(ValueError, match=message):
            check_private(folder, ["NOTES.md"], "", vocabulary, known=set())


@pytest.mark.parametrize("value", ["1E-3", "0.001"])
def test_numbers_are_written_as_in_python(dense, tmp_path, value):
    result = run(dense, tmp_path / "out", "--change", f"refit_ridge={value}")
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert report["recipe"]["refit_ridge"] == 0.001


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ("refit_ridge=little", "refit_ridge is 'little'; it must be of type float"),
        ("refit_ridge=nan", "refit_ridge is nan; it must be finite"),
        ("router_ridge=.inf", "router_ridge is inf; it must be finite"),
        ("refit_ridge=", "refit_ridge is None; it must be of type float"),
        ("max_iterations=8.0", "max_iterations is 8.0; it must be of type int"),
        ("pinned=true", "always_on is True; it must be of type int"),
        ("refit=1", "refit is 1; it must be of type bool"),
        ("router=[linear]", "router is ['linear']; it must be of type str"),
        ("router=[", "--change router=[ has no value that can be read"),
    ],
)
def test_a_change_of_another_type_is_refused(dense, no_leftovers, change, phrase):
    refused(run(dense, no_leftovers, "--change", change), 2, phrase)


@pytest.fixture
def quiet():
    """Without the progress bars that `main` turns off where nobody sees them."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def shrink(folder, edit_config, vocabulary):
    """Cut the last tokens off a model, not off its tokenizer."""
    edit_config(folder, vocab_size=vocabulary)
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:vocabulary].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def beyond(carved, tmp_path):
    """A carved model whose tokenizer has a token more than its embedding."""
    folder = shutil.copytree(carved, tmp_path / "beyond")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["function"])
    tokenizer.save_pretrained(folder)
    return folder


PAPER = ["--objective", "next-token", "--samples", 4]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("evaluate", ["--text", HELD_OUT]),
        ("report", ["--text", HELD_OUT]),
        ("benchmark", ["--text", HELD_OUT, "--rounds", 1, "--prefill", 64, "--context", 64]),
        ("recover", ["OUT", "--training", CALIBRATION, "--text", HELD_OUT, *PAPER]),
    ],
)
def test_a_token_beyond_the_embedding_is_refused(beyond, quiet, tmp_path, command, options):
    out = tmp_path / "out"
    result = cli(command, beyond, *(out if option == "OUT" else option for option in options))
    refused(result, 2, "the tokenizer gives token 1024, but the model's vocabulary has 1024")
    assert not list(tmp_path.glob("out*")) and not (beyond / "report").exists()


def test_a_token_beyond_the_embedding_of_the_baseline(dense, dense_copy, edit_config, quiet):
    """The model knows all tokens; the dense one beside it is too small for some."""
    shrink(dense_copy, edit_config, 1000)
    result = cli("evaluate", dense, "--baseline", dense_copy, "--text", HELD_OUT)
    refused(result, 2, "but the model's vocabulary has 1000")


@pytest.fixture
def stopped(dense, tmp_path):
    """A conversion that was interrupted after its first layer, and whose text is gone since."""
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"body": CALIBRATION.read_text()}))
    with interrupted_at("model.safetensors", 4):
        result = run(dense, tmp_path / "out", "--calibration", f"{text}:body")
    assert result.exit_code == 1 and "--resume" in result.stderr
    text.unlink()
    return tmp_path / "out"


def test_resume_needs_no_text(stopped, carved, tensors):
    result = cli("convert", stopped, "--resume")
    assert result.exit_code == 0, result.stderr
    whole, resumed = tensors(carved), tensors(stopped)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    calibration = json.loads((stopped / "conversion.json").read_text())["calibration"]
    assert calibration["source"] == "text.jsonl:body" and calibration["samples"] == 4
    assert str(stopped.parent) not in (stopped / "conversion.json").read_text()


def test_damaged_windows_are_not_resumed(stopped):
    windows = stopped.with_name("out.partial") / "work" / "windows.safetensors"
    content = windows.read_bytes()
    windows.write_bytes(content[:-8])
    refused(cli("convert", stopped, "--resume"), 1, "windows.safetensors", "--overwrite")
    windows.write_bytes(content[:-8] + bytes(8))
    refused(cli("convert", stopped, "--resume"), 2, "calibration text has changed")
    windows.unlink()  # as if it had been killed before they were written
    refused(cli("convert", stopped, "--resume"), 2, "there is no text file")


def test_a_recovery_is_resumed_without_its_texts(carved, tmp_path):
    texts = {"training": tmp_path / "training.txt", "text": tmp_path / "text.txt"}
    texts["training"].write_text(CALIBRATION.read_text())
    texts["text"].write_text(HELD_OUT.read_text()[:4_000])
    tuning = Tuning(objective="next-token", samples=4, sequence_length=64)
    with pytest.raises(KeyboardInterrupt), interrupted_at("modeling_cmoe.py"):
        recover(carved, tmp_path / "out", **texts, tuning=tuning)
    for path in texts.values():
        path.unlink()
    result = cli("recover", tmp_path / "out", "--resume", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout).keys() == Recovery.__dataclass_fields__.keys()
    report = json.loads((tmp_path / "out" / "recovery.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(carved)
    ids = tokenizer(CALIBRATION.read_text(), verbose=False)["input_ids"]
    assert report["training_text_tokens"] == len(ids)
    assert report["training"] == "training.txt" and report["sequence_length"] == 64


@pytest.fixture
def overflowing(carved, tmp_path):
    """Make a carved model's final norm so large that its logits overflow, or nearly."""

    def make(scale):
        folder = shutil.copytree(carved, tmp_path / f"overflowing-{scale}")
        shard = folder / "model.safetensors"
        tensors = load_file(shard)
        tensors["model.norm.weight"].fill_(scale)
        save_file(tensors, shard, metadata={"format": "pt"})
        return folder

    return make


def test_what_is_not_finite_is_named_instead_of_printed(overflowing, tmp_path, quiet):
    result = cli("export", overflowing(3e38), tmp_path / "native", "--json")
    assert result.exit_code == 1 and result.stdout == ""
    [line] = [line for line in result.stderr.splitlines() if "error" in line]
    assert "its logits are not finite numbers" in line
    assert "Traceback" not in result.stderr and isinstance(result.exception, SystemExit)


def test_a_perplexity_that_no_number_holds(overflowing, quiet):
    result = cli("evaluate", overflowing(1e30), "--text", HELD_OUT, "--json")
    refused(result, 1, "mean loss on this text is", "perplexity")


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EBADF])
def test_activations_on_a_disk_that_reserves_no_room(
    dense, carved, tensors, tmp_path, monkeypatch, number
):
    """What such a file system answers; there is none here."""

    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    result = run(dense, tmp_path / "out", "--activations", "disk")
    assert result.exit_code == 0, result.stderr
    whole, stored = tensors(carved), tensors(tmp_path / "out")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in whole.items())
    room = shutil.disk_usage(tmp_path).free // 4
    with pytest.raises(CMoEError, match=r"cannot keep activations in .*: No space left on device"):
        Storage(torch.device("cpu"), tmp_path).empty("large", room + (1 << 28))


def test_a_disk_that_fails_is_one_line(dense, no_leftovers, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    result = run(dense, no_leftovers, "--activations", "disk")
    refused(result, 1, "cannot keep activations in", os.strerror(errno.ENOSPC))
