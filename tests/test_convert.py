# SPDX-License-Identifier: Apache-2.0
"""The converted repository: complete, reproducible, and loadable where this package is not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cmoe_hf.conversion.folder.remote_code import REMOTE_CODE

FILES = {
    "config.json",
    *REMOTE_CODE,
    "conversion.json",
    "generation_config.json",
    "model.safetensors",
    "README.md",
    "tokenizer.json",
    "tokenizer_config.json",
}


def test_the_folder_is_complete(carved):
    assert {path.name for path in carved.iterdir()} == FILES
    assert not list(carved.parent.glob("*.partial"))
    with safe_open(carved / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    config = json.loads((carved / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_cmoe.CMoELlamaConfig",
        "AutoModel": "modeling_cmoe.CMoELlamaModel",
        "AutoModelForCausalLM": "modeling_cmoe.CMoELlamaForCausalLM",
    }
    assert config["architectures"] == ["CMoELlamaForCausalLM"]


def test_saved_with_the_package_it_is_still_complete(carved, tmp_path):
    AutoModelForCausalLM.from_pretrained(carved).save_pretrained(tmp_path)
    assert all((tmp_path / name).is_file() for name in REMOTE_CODE)
    before = json.loads((carved / "config.json").read_text())
    after = json.loads((tmp_path / "config.json").read_text())
    assert after["auto_map"] == before["auto_map"]
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("recipe", ["refined", "paper", "released"])
def test_the_same_request_gives_the_same_bytes(dense, carve, tmp_path, recipe):
    again = shutil.copytree(dense, tmp_path / dense.name)
    first, second = (carve(source, recipe=recipe) for source in (dense, again))
    for path in sorted(first.glob("*.safetensors")):
        assert path.read_bytes() == (second / path.name).read_bytes()
    assert (first / "config.json").read_bytes() == (second / "config.json").read_bytes()


def test_another_seed_gives_other_windows(dense, carve, tensors):
    first, second = (tensors(carve(dense, seed=seed)) for seed in (0, 1))
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_configuration(make_dense, carve, family):
    source = make_dense(family)
    dense, carved = (AutoConfig.from_pretrained(folder) for folder in (source, carve(source)))
    other = {"model_type", "architectures", "_name_or_path"}
    if hasattr(dense, "num_experts"):  # of a MoE, the experts are others
        other |= {"num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob"}
        other |= {"intermediate_size", "moe_intermediate_size"}
    kept = carved.to_dict()
    for name, value in dense.to_dict().items():
        assert name in other or kept[name] == value, name


def test_source_precision_is_kept_unless_another_is_asked_for(embedded, carve, tensors):
    for dtype, expected in ((None, torch.bfloat16), ("float16", torch.float16)):
        folder = carve(embedded, (3, 3, 8), dtype=dtype, recipe="paper")
        for name, tensor in tensors(folder).items():
            kept = torch.float32 if name.endswith("balance_bias") else expected
            assert tensor.dtype == kept, name
        assert AutoConfig.from_pretrained(folder).dtype == expected


def test_tokenizer_and_generation_config_survive(dense_copy, carve):
    tokenizer = AutoTokenizer.from_pretrained(dense_copy)
    tokenizer.chat_template = "{% for message in messages %}<s>{{ message.content }}{% endfor %}"
    tokenizer.add_tokens(["<new>"], special_tokens=True)
    tokenizer.add_tokens(["</s>"])
    tokenizer.save_pretrained(dense_copy)
    GenerationConfig(max_new_tokens=7, do_sample=True, temperature=0.5).save_pretrained(dense_copy)
    folder = carve(dense_copy)
    again = AutoTokenizer.from_pretrained(folder)
    text = "def f(x): <new> return 'é'</s>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    messages = [{"role": "user", "content": "hello"}]
    assert again.apply_chat_template(messages, tokenize=False) == "<s>hello"
    assert again.eos_token == "</s>" and again.pad_token == "</s>"
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.max_new_tokens, generation.temperature) == (7, 0.5)


def test_the_card_states_base_model_licence_and_measurements(dense_copy, carve):
    licence = "license: llama2\nlicense_link: LICENSE.txt"
    (dense_copy / "README.md").write_text(f"---\n{licence}\n---\nHi\n")
    (dense_copy / "LICENSE.txt").write_text("terms")
    folder = carve(dense_copy)
    card = ModelCard.load(folder / "README.md")
    data, config = card.data.to_dict(), AutoConfig.from_pretrained(folder)
    assert data["base_model"] == "copy"
    assert data["license"] == "llama2" and data["license_link"] == "LICENSE.txt"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert {"moe", "cmoe"} <= set(data["tags"])
    whole = sum(
        tensor.numel() for tensor in AutoModelForCausalLM.from_pretrained(dense_copy).parameters()
    )
    ffn = 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
    run = f"{(whole - ffn / 2) / 1000:.3g} k of {whole / 1000:.3g} k"
    led = f"| not measured yet: `cmoe evaluate --baseline DENSE --card` | 50.0% | {run} |"
    assert "S2A2E8" in card.text and led in card.text
    assert "trust_remote_code=True" in card.text
    assert (folder / "LICENSE.txt").read_text() == "terms"
    assert card.text.count("\n| 0 | 0.") == 1  # the measured error of layer 0


def test_nothing_published_names_a_path_or_a_user(dense, carve, tmp_path, calibration_text):
    text = tmp_path / "private-user" / "notes.txt"
    text.parent.mkdir()
    text.write_text(calibration_text.read_text())
    folder = carve(dense, calibration=text)
    for path in folder.iterdir():
        content = path.read_bytes()
        for secret in (str(tmp_path), "private-user", str(dense.parent), str(Path.home()) + "/"):
            assert secret.encode() not in content, f"{secret} in {path.name}"
    assert json.loads((folder / "conversion.json").read_text())["calibration"]["source"] == (
        "notes.txt"
    )


def test_conversion_json_records_what_made_the_model(carved):
    report = json.loads((carved / "conversion.json").read_text())
    settings = {"shared": 2, "active": 2, "experts": 8, "dense_layers": [], "budget": None}
    settings |= {"samples": 4, "sequence_length": 64, "k_act": 10, "seed": 0, "dtype": None}
    settings |= {"recipe": "refined", "calibration": "calibration.txt"}
    assert report["settings"] == settings
    assert report["calibration"]["tokens"] == 256
    assert len(report["calibration"]["sha256"]) == 64
    assert report["versions"]["torch"] == torch.__version__
    assert report["source"] == {"name": "llama-2", "revision": None}
    assert report["result"]["notation"] == "S2A2E8"
    carving, bare = (
        sum(layer["seconds"][name] for layer in report["layers"])
        for name in ("carving_pass", "bare_forward")
    )
    assert report["result"]["carving_ratio"] == pytest.approx(carving / bare)


def test_an_old_checkpoint_with_stored_frequencies_converts(dense_copy, carve, tensors):
    from safetensors.torch import load_file, save_file

    path = dense_copy / "model.safetensors"
    stored = load_file(path)
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(stored, path, metadata={"format": "pt"})
    assert not any("inv_freq" in name for name in tensors(carve(dense_copy)))


def test_a_sharded_checkpoint_gives_the_same_model(dense, dense_copy, carve, tensors):
    AutoModelForCausalLM.from_pretrained(dense).save_pretrained(dense_copy, max_shard_size="100KB")
    (dense_copy / "model.safetensors").unlink()
    assert len(list(dense_copy.glob("*.safetensors"))) > 2
    whole, sharded = tensors(carve(dense)), tensors(carve(dense_copy))
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
