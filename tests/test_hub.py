# SPDX-License-Identifier: Apache-2.0
"""Models by Hub id, over a real HTTP connection to a loopback Hub."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hub import COMMIT
from test_bad_input import refused, run
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cmoe_hf.conversion import evaluate
from cmoe_hf.conversion.cli import app
from cmoe_hf.conversion.embedded import CALIBRATION, HELD_OUT


def test_a_hub_model_is_converted_with_its_revision_recorded(hub, dense, tmp_path, tensors, carved):
    hub.publish("org/dense", dense)
    result = run("org/dense", tmp_path / "out", "--revision", "main")
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert report["source"] == {"name": "org/dense", "revision": COMMIT}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: org/dense" in card and COMMIT in card
    local, remote = tensors(carved), tensors(tmp_path / "out")
    assert all(torch.equal(local[name], remote[name]) for name in local)


def test_a_carved_hub_model_is_evaluated_and_saved_again(hub, carved, short_text, tmp_path):
    hub.publish("org/carved", carved)
    model = AutoModelForCausalLM.from_pretrained("org/carved", trust_remote_code=True)
    model.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert len(auto_map) == 3
    assert not any("--" in entry for entry in auto_map.values())  # its own code
    arguments = ["evaluate", "org/carved", "--text", str(short_text), "--json"]
    result = CliRunner().invoke(app, [*arguments, "--sequence-length", "128"])
    assert result.exit_code == 0, result.stderr
    local = evaluate(carved, text=short_text, sequence_length=128)
    assert json.loads(result.stdout)["perplexity"] == local.perplexity


CARD = """---
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - {split: test, path: wikitext-2-raw-v1/test-*}
  - {split: train, path: wikitext-2-raw-v1/train-*}
---
"""


def test_the_texts_that_nobody_named_come_from_the_hub(hub, dense, tmp_path, tensors):
    data = tmp_path / "data" / "wikitext-2-raw-v1"
    data.mkdir(parents=True)
    (tmp_path / "data" / "README.md").write_text(CARD)
    for split, text in (("train", CALIBRATION), ("test", HELD_OUT)):
        lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
        pq.write_table(pa.table({"text": lines}), data / f"{split}-00000-of-00001.parquet")
    hub.publish("datasets/Salesforce/wikitext", tmp_path / "data")
    shape = ["--shared", "2", "--active", "2", "--experts", "8"]
    few = ["--samples", "4", "--sequence-length", "64"]
    [train], [test] = data.glob("train-*"), data.glob("test-*")
    for name, options in (("hub", []), ("local", ["--calibration", str(train)])):
        made = [str(dense), str(tmp_path / name), *shape, *few, *options]
        result = CliRunner().invoke(app, ["convert", *made])
        assert result.exit_code == 0, result.stderr
    local, remote = tensors(tmp_path / "local"), tensors(tmp_path / "hub")
    assert all(torch.equal(local[name], remote[name]) for name in local)
    arguments = ["evaluate", str(tmp_path / "hub"), "--json", "--sequence-length", "64"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    local = evaluate(tmp_path / "hub", text=test, sequence_length=64)
    assert json.loads(result.stdout)["perplexity"] == local.perplexity


def test_only_the_files_that_are_needed_are_fetched(hub, dense_copy, tmp_path):
    (dense_copy / "pytorch_model.bin").write_text("pickle")
    (dense_copy / "modeling_evil.py").write_text("raise SystemExit")
    hub.publish("org/messy", dense_copy)
    assert run("org/messy", tmp_path / "out").exit_code == 0
    fetched = [path for path in hub.requests if "/org/messy/resolve/" in path]
    assert fetched and not any(path.endswith((".bin", ".py")) for path in fetched)


@pytest.mark.parametrize(
    ("model", "options", "status", "phrases"),
    [
        ("org/absent", (), 2, ["no folder and no Hub repository named org/absent"]),
        ("org/gated", (), 2, ["org/gated is gated", "hf auth login"]),
        ("org/unreachable", (), 1, ["cannot reach the Hub", "give a local folder"]),
        ("org/known", ("--revision", "nowhere"), 2, ["has no revision nowhere"]),
    ],
)
def test_what_the_hub_refuses(hub, dense, no_leftovers, model, options, status, phrases):
    hub.publish("org/known", dense)
    refused(run(model, no_leftovers, *options), status, *phrases)


def test_a_repository_that_is_no_model(hub, tmp_path, no_leftovers):
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "README.md").write_text("a data set")
    hub.publish("org/dataset", tmp_path / "repo")
    refused(run("org/dataset", no_leftovers), 2, "no config.json")


def test_an_unsupported_hub_model_is_refused_before_its_weights_are_fetched(
    hub, dense_copy, no_leftovers, edit_config
):
    edit_config(dense_copy, model_type="vit", architectures=["ViTModel"])
    hub.publish("org/vit", dense_copy)
    refused(run("org/vit", no_leftovers), 2, "'vit'", "ViTModel")
    assert not any("org/vit" in path and "safetensors" in path for path in hub.requests)
