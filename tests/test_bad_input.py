# SPDX-License-Identifier: Apache-2.0
"""Every bad request ends in one clear line, the right exit status and nothing on disk."""

import json
import math
import random
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from killable import interrupted_at
from refusal import refused
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cmoe_hf.conversion.cli import app
from cmoe_hf.conversion.embedded import CALIBRATION
from cmoe_hf.conversion.errors import CMoEError
from cmoe_hf.conversion.source.checkpoint import open_source


def run(model, out, *options, shared=2, active=2, experts=8):
    arguments = ["convert", str(model), str(out), "--json"]
    arguments += ["--shared", str(shared), "--active", str(active), "--experts", str(experts)]
    if "--calibration" not in options:
        arguments += ["--calibration", str(CALIBRATION)]
    arguments += ["--samples", "4", "--sequence-length", "64", *options]
    return CliRunner().invoke(app, arguments)


def test_width_not_divisible_names_the_divisors(dense, no_leftovers):
    result = run(dense, no_leftovers, experts=7)
    refused(result, 2, "96 is not divisible by 7", "2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96")


@pytest.mark.parametrize(
    ("shape", "phrase"),
    [
        ((5, 4, 8), "5 shared + 4 active = 9 experts, but there are only 8"),
        ((0, 9, 8), "0 shared + 9 active = 9 experts, but there are only 8"),
        ((0, 0, 8), "runs no neuron"),
        ((8, 0, 8), "it is the dense model"),
        ((-1, 2, 8), "cannot be negative"),
        ((0, 0, 0), "at least one expert"),
    ],
)
def test_impossible_shapes(dense, no_leftovers, shape, phrase):
    shared, active, experts = shape
    result = run(dense, no_leftovers, shared=shared, active=active, experts=experts)
    refused(result, 2, phrase)


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        (["--recipe", "magic"], "choose one of paper, released, refined"),
        (["--change", "magic=1"], "a recipe has no choice magic"),
        (["--change", "refit"], "not of the form KEY=VALUE"),
        (["--change", "router=magic"], "it can be representative, linear"),
        (["--change", "refit=maybe"], "must be of type bool"),
        (["--change", "refit_ridge=0"], "must be above 0"),
        (["--change", "router=representative"], "needs clusters of marks"),
        (["--change", "pinned=3"], "at S2A2E8 it can be at most 2"),
        (["--change", "pinned=-1"], "cannot be negative"),
        (["--change", "adaptive_split=true", "--recipe", "paper"], "use --recipe refined"),
        (["--change", "adaptive_split=true", "--change", "refit=false"], "leave the refit on"),
        (["--budget", "0.5"], "leave out --active"),
        (["--dtype", "int3"], "choose one of float32, bfloat16, float16"),
        (["--k-act", "97"], "has only 96 neurons"),
        (["--k-act", "0"], "at least 1"),
        (["--samples", "0"], "at least 1"),
        (["--device", "quantum"], "device 'quantum' cannot be used"),
        (["--device", "cuda:0,cuda:1"], "a conversion uses one device"),
        (["--sequence-length", "4096"], "context of 128"),
    ],
)
def test_impossible_options(dense, no_leftovers, options, phrase):
    refused(run(dense, no_leftovers, *options), 2, phrase)


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ([], "--shared and --active, or --budget"),
        (["--shared", "2"], "--shared and --active, or --budget"),
        (["--budget", "0.3"], "It can be 0.125, 0.25, 0.375"),
        (["--budget", "1"], "not a whole number of 8 experts"),
        (["--budget", "-0.25"], "not a whole number of 8 experts"),
        (["--budget", "nan"], "not a whole number of 8 experts"),
        (["--budget", "0.25", "--shared", "3"], "more than the 2 experts"),
        (["--budget", "0.25", "--recipe", "released"], "use --recipe refined"),
    ],
)
def test_impossible_budgets(dense, no_leftovers, options, phrase):
    command = ["convert", dense, no_leftovers, "--experts", "8", "--calibration", CALIBRATION]
    result = CliRunner().invoke(app, [*map(str, command), *options])
    refused(result, 2, phrase)


def test_what_is_no_causal_language_model(dense_copy, no_leftovers, edit_config):
    for model_type in ("vit", "something-else"):
        edit_config(dense_copy, model_type=model_type, architectures=["OfMine"])
        said = (repr(model_type), "OfMine", "no causal language model of that type")
        refused(run(dense_copy, no_leftovers), 2, *said)


def test_a_carved_model_is_not_carved_again(carved, no_leftovers):
    refused(run(carved, no_leftovers), 2, "'cmoe_llama'", "it is carved already")


def test_quantised_weights_are_refused(dense_copy, no_leftovers, edit_config):
    edit_config(dense_copy, quantization_config={"quant_method": "gptq"})
    refused(run(dense_copy, no_leftovers), 2, "quantised (gptq)")


def test_a_truncated_and_a_missing_shard(sharded, no_leftovers):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(run(sharded, no_leftovers), 2, f"shard {shard.name} is corrupt or truncated")
    shard.unlink()
    refused(run(sharded, no_leftovers), 2, f"shard {shard.name} is missing")


def test_a_corrupt_shard(dense_copy, no_leftovers):
    for content in (b"", b"not safetensors", b"\xff" * 64):
        (dense_copy / "model.safetensors").write_bytes(content)
        refused(run(dense_copy, no_leftovers), 2, "model.safetensors is corrupt or truncated")


def test_a_flipped_byte_in_a_shard_header(dense_copy, tmp_path):
    """Refused by name, or harmless: never another model."""
    path = dense_copy / "model.safetensors"
    whole = path.read_bytes()
    expected = open_source(dense_copy).digest()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    generator = random.Random(0)
    refusals = 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[generator.randrange(header)] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            assert open_source(dense_copy).digest() == expected
        except CMoEError as error:
            assert re.search(r"shard|tensor", str(error)), error
            refusals += 1
    assert refusals > 40


def test_a_tensor_in_two_shards(sharded, no_leftovers):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    name, home = next(iter(index["weight_map"].items()))
    other = next(shard for shard in index["weight_map"].values() if shard != home)
    tensors = load_file(sharded / other) | {name: load_file(sharded / home)[name] + 1}
    save_file(tensors, sharded / other, metadata={"format": "pt"})
    refused(run(sharded, no_leftovers), 2, name, home, other, "nobody can say which one counts")


def test_only_pickled_weights(dense_copy, no_leftovers):
    (dense_copy / "model.safetensors").rename(dense_copy / "pytorch_model.bin")
    refused(run(dense_copy, no_leftovers), 2, "read from safetensors only")


def change_weights(folder: Path, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_unknown_and_misshapen_tensors(dense_copy, no_leftovers):
    name = "model.layers.1.mlp.up_proj.weight"
    kept = load_file(dense_copy / "model.safetensors")[name]
    change_weights(dense_copy, lambda tensors: tensors.pop(name))
    refused(run(dense_copy, no_leftovers), 2, "lacks 1 tensors", name)
    change_weights(dense_copy, lambda tensors: tensors.update({name: kept[:48].clone()}))
    refused(run(dense_copy, no_leftovers), 2, name, "[48, 64]", "[96, 64]")
    change_weights(dense_copy, lambda tensors: tensors.update({name: kept, "extra": kept.clone()}))
    refused(run(dense_copy, no_leftovers), 2, "holds 1 tensors", "extra")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(dense_copy, no_leftovers, value):
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(dense_copy, lambda tensors: tensors[name][3].fill_(value))
    refused(run(dense_copy, no_leftovers), 1, name, "NaN or infinite")


def test_activations_that_are_not_finite(dense_copy, tmp_path):
    def overflow(tensors):
        tensors["model.layers.1.mlp.gate_proj.weight"].fill_(1e30)
        tensors["model.layers.1.mlp.up_proj.weight"].fill_(1e30)

    change_weights(dense_copy, overflow)
    phrases = ("layer 1 produces NaN or infinite activations", "Layers finished: 1; go on with")
    refused(run(dense_copy, tmp_path / "out"), 1, *phrases)
    assert [path.name for path in tmp_path.glob("out*")] == ["out.partial"]


def test_too_little_calibration_text(dense, no_leftovers, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("Too short.\n" * 5)
    result = run(dense, no_leftovers, "--calibration", str(text))
    refused(result, 2, "4 windows of 64 need 256", "--samples")


@pytest.mark.parametrize(
    ("name", "content", "phrase"),
    [
        ("absent.txt", None, "no text file"),
        ("latin.txt", "é".encode("latin-1"), "not UTF-8"),
        ("rows.jsonl", b'{"a": "x", "b": "y"}\n', "no column 'text'; it has ['a', 'b']"),
    ],
)
def test_unreadable_calibration_text(dense, no_leftovers, tmp_path, name, content, phrase):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    refused(run(dense, no_leftovers, "--calibration", str(path)), 2, phrase)


def test_an_unknown_data_set(dense, no_leftovers):
    result = run(dense, no_leftovers, "--calibration", "nobody/nothing")
    refused(result, 2, "cannot read nobody/nothing as a data set")


def test_no_tokenizer(dense_copy, no_leftovers):
    (dense_copy / "tokenizer.json").unlink()
    refused(run(dense_copy, no_leftovers), 2, "has no tokenizer")


def test_the_tokenizer_of_another_model(dense_copy, no_leftovers, edit_config):
    edit_config(dense_copy, vocab_size=10)

    def shrink(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:10].clone()

    change_weights(dense_copy, shrink)
    refused(run(dense_copy, no_leftovers), 2, "tokenizer of another model")


def test_an_existing_output_is_never_overwritten_unasked(dense, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    refused(run(dense, out), 2, "out exists already", "--overwrite")
    refused(run(dense, out, "--overwrite"), 2, "not a model repository")
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_overwrite_replaces_a_model_unless_it_fails(dense, dense_copy, tmp_path):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is fine
    assert run(dense, out).exit_code == 0
    first = (out / "config.json").read_bytes()
    (out / "old-file").write_text("")
    assert run(dense, out, "--overwrite", active=3).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert before["config.json"] != first and "old-file" not in before
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(dense_copy, lambda tensors: tensors[name].fill_(1e38))
    assert run(dense_copy, out, "--overwrite").exit_code == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def test_no_disk_space(dense_copy, no_leftovers, edit_config):
    """A sparse file stands for a checkpoint that is larger than the disk."""
    rows = int(shutil.disk_usage(dense_copy).free * 1.1) // (64 * 4)
    path = dense_copy / "model.safetensors"
    tensors = load_file(path)
    shapes = {name: list(it.shape) for name, it in tensors.items() if name != "lm_head.weight"}
    shapes["model.embed_tokens.weight"] = [rows, 64]
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        try:
            file.truncate(8 + len(text) + end)
        except OSError:
            pytest.skip("this file system has no sparse files")
    edit_config(dense_copy, vocab_size=rows, tie_word_embeddings=True)
    refused(run(dense_copy, no_leftovers), 2, "GB free")


def test_damaged_json(dense_copy, sharded, no_leftovers, edit_config):
    edit_config(dense_copy, num_attention_heads="many")
    refused(run(dense_copy, no_leftovers), 2, "config.json of copy is not usable")
    (dense_copy / "config.json").write_text('{"model_type": "lla')
    refused(run(dense_copy, no_leftovers), 2, "config.json is not valid JSON")
    (sharded / "model.safetensors.index.json").write_text("[]")
    refused(run(sharded, no_leftovers), 2, "model.safetensors.index.json is not a JSON object")


def test_not_a_model_at_all(tmp_path, no_leftovers):
    (tmp_path / "empty").mkdir()
    refused(run(tmp_path / "empty", no_leftovers), 2, "no config.json")
    refused(run(tmp_path / "absent", no_leftovers), 2, "neither a folder nor the id")
    refused(run("not//valid::id", no_leftovers), 2, "neither a folder nor the id")


def test_remote_code_is_not_run_unasked(dense_copy, tmp_path, edit_config):
    canary = tmp_path / "canary"
    (dense_copy / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    edit_config(
        dense_copy,
        model_type="evil",
        auto_map={
            "AutoConfig": "modeling_evil.Config",
            "AutoModelForCausalLM": "modeling_evil.Model",
        },
    )
    result = run(dense_copy, tmp_path / "out")
    refused(result, 2, "'evil'")
    arguments = ["evaluate", str(dense_copy), "--text", str(CALIBRATION), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and result.stdout == ""
    assert not canary.exists()


TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
class Own(PreTrainedTokenizerFast):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        Path({!r}).touch()
"""


def test_a_source_that_carries_code_must_be_trusted(
    dense_copy, tmp_path, edit_config, tensors, caplog
):
    canary = tmp_path / "canary"
    assert run(dense_copy, tmp_path / "plain").exit_code == 0
    (dense_copy / "tokenization_own.py").write_text(TOKENIZER.format(str(canary)))
    path = dense_copy / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": [None, "tokenization_own.Own"]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    refused(run(dense_copy, tmp_path / "out"), 2, "auto_map in tokenizer_config.json", "--trust-")
    edit_config(dense_copy, auto_map={"AutoModelForCausalLM": "modeling_own.Model"})
    refused(run(dense_copy, tmp_path / "out"), 2, "auto_map in config.json", "--trust-remote-code")
    assert not canary.exists() and not (tmp_path / "out").exists()
    result = run(dense_copy, tmp_path / "out", "--trust-remote-code")
    assert result.exit_code == 0, result.stderr
    assert canary.exists()
    assert "it is taken as stock" in caplog.text
    # Its code calibrates on other tokens, perhaps; what is outside the FFNs stays as it was.
    plain, carved = tensors(tmp_path / "plain"), tensors(tmp_path / "out")
    assert plain.keys() == carved.keys()
    assert all(torch.equal(plain[name], carved[name]) for name in plain if ".mlp." not in name)
    auto_map = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_cmoe.CMoELlamaForCausalLM"


def test_interrupted_it_leaves_nothing_that_looks_finished(dense, no_leftovers):
    with interrupted_at("manifest.json"):
        refused(run(dense, no_leftovers), 1, "interrupted: nothing is half-written.")


def test_debug_shows_the_traceback(dense, tmp_path):
    result = run(dense, tmp_path / "out", "--debug", experts=7)
    assert result.exit_code != 0
    assert result.exception is not None and "not divisible" in str(result.exception)
