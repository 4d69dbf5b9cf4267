# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is read as the library's loader reads it, or refused: never carved as another."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import relatives_last
from refusal import refused
from safetensors.torch import load_file, save_file
from test_bad_input import change_weights, run
from test_output import command
from transformers import AutoModelForCausalLM

from cmoe_hf.conversion import convert, evaluate, plan, verify
from cmoe_hf.conversion.embedded import CALIBRATION
from cmoe_hf.conversion.source.checkpoint import open_source

FEW = {"calibration": CALIBRATION, "samples": 4, "sequence_length": 64}


def logits(folder, token_ids):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(token_ids).logits


def carved_whole(folder, out, token_ids):
    """Carve with all experts active; the folder of the result and how far its logits are off."""
    convert(folder, out, shared=2, active=6, experts=8, **FEW)
    difference = logits(out, token_ids) - logits(folder, token_ids)
    return out, difference.abs().max().item()


def rename(folder, change):
    path = folder / "model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


# The head


@pytest.mark.parametrize("family", ["llama-2", "pythia"])
def test_a_head_that_differs_from_the_embedding_is_kept(
    own_dense, tmp_path, edit_config, token_ids, tensors, family
):
    folder = own_dense(family)
    edit_config(folder, tie_word_embeddings=True)
    out, difference = carved_whole(folder, tmp_path / "out", token_ids)
    assert difference < 1e-4
    assert "lm_head.weight" in tensors(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("family", ["llama-3", "pythia"])
@pytest.mark.parametrize("names", ["both", "head alone"])
def test_a_head_that_equals_the_embedding_is_stored_once(
    own_dense, tmp_path, token_ids, tensors, family, names
):
    folder = own_dense(family, tie_word_embeddings=True)
    embedding = "gpt_neox.embed_in.weight" if family == "pythia" else "model.embed_tokens.weight"
    head = "embed_out.weight" if family == "pythia" else "lm_head.weight"

    def repeat(stored):
        value = stored[embedding] if names == "both" else stored.pop(embedding)
        stored[head] = value.clone()

    change_weights(folder, repeat)
    out, difference = carved_whole(folder, tmp_path / "out", token_ids)
    assert difference < 1e-4
    assert "lm_head.weight" not in tensors(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize(("family", "head"), [("llama-2", "lm_head"), ("pythia", "embed_out")])
def test_a_head_that_is_neither_there_nor_tied(own_dense, no_leftovers, family, head):
    folder = own_dense(family)
    change_weights(folder, lambda stored: stored.pop(f"{head}.weight"))
    refused(run(folder, no_leftovers), 2, "no head (lm_head.weight)", "tie_word_embeddings")


# The files


@pytest.fixture
def same_tensors(tensors):
    def compare(folder, other):
        one, two = tensors(folder), tensors(other)
        return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

    return compare


@pytest.mark.parametrize("shards", ["there", "gone"])
def test_a_single_file_comes_before_an_index_left_behind(
    sharded, dense, carved, tmp_path, same_tensors, caplog, shards
):
    shutil.copy(dense / "model.safetensors", sharded)
    if shards == "gone":
        for path in sharded.glob("model-*.safetensors"):
            path.unlink()
    assert run(sharded, tmp_path / "out").exit_code == 0
    assert same_tensors(tmp_path / "out", carved)
    assert "model.safetensors.index.json is ignored" in caplog.text


def test_shards_in_other_places_under_other_names(sharded, tmp_path, same_tensors):
    assert run(sharded, tmp_path / "before").exit_code == 0
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    (sharded / "parts").mkdir()
    for number, shard in enumerate(sorted(set(index["weight_map"].values()))):
        (sharded / shard).rename(sharded / "parts" / f"{number}.safetensors")
        for name, file in index["weight_map"].items():
            if file == shard:
                index["weight_map"][name] = f"parts/{number}.safetensors"
    path.write_text(json.dumps(index))
    assert run(sharded, tmp_path / "out").exit_code == 0
    assert same_tensors(tmp_path / "out", tmp_path / "before")


def test_a_file_named_by_the_configuration_comes_first(
    dense_copy, sharded, carved, tmp_path, same_tensors, edit_config
):
    (dense_copy / "model.safetensors").rename(dense_copy / "own.safetensors")
    for path in sharded.glob("model*"):
        shutil.copy(path, dense_copy)
    edit_config(dense_copy, transformers_weights="own.safetensors")
    assert run(dense_copy, tmp_path / "out").exit_code == 0
    assert same_tensors(tmp_path / "out", carved)
    assert "transformers_weights" not in (tmp_path / "out" / "config.json").read_text()


def test_links_into_a_cache_and_foreign_files(dense_copy, carved, tmp_path, same_tensors):
    (tmp_path / "blobs").mkdir()
    path = dense_copy / "model.safetensors"
    path.rename(tmp_path / "blobs" / "0123abcd")
    path.symlink_to(tmp_path / "blobs" / "0123abcd")
    save_file({"tok_embeddings.weight": torch.ones(2, 2)}, dense_copy / "consolidated.safetensors")
    assert run(dense_copy, tmp_path / "out").exit_code == 0
    assert same_tensors(tmp_path / "out", carved)


def test_only_a_variant(dense_copy, no_leftovers):
    (dense_copy / "model.safetensors").rename(dense_copy / "model.fp16.safetensors")
    refused(run(dense_copy, no_leftovers), 2, "model.safetensors is missing", "model.fp16.safe")


def test_an_index_that_is_none(sharded, no_leftovers):
    for where in (None, ["model.safetensors"], {"lm_head.weight": 1}):
        (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        refused(run(sharded, no_leftovers), 2, "model.safetensors.index.json has no weight_map")


@pytest.mark.parametrize("how", ["../elsewhere.safetensors", "C:\\x", None])
@pytest.mark.parametrize("named_by", ["index", "config.json"])
def test_weights_outside_the_folder(sharded, no_leftovers, tmp_path, edit_config, how, named_by):
    outside = tmp_path / "elsewhere.safetensors"
    shutil.copy(next(sharded.glob("*.safetensors")), outside)
    name = how or str(outside)
    if named_by == "config.json":
        edit_config(sharded, transformers_weights=name)
    else:
        path = sharded / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["lm_head.weight"] = name
        path.write_text(json.dumps(index))
    refused(run(sharded, no_leftovers), 2, named_by, f"names {name}, which is outside")
    refused(command("evaluate", sharded, "--text", CALIBRATION), 2, "outside the model's folder")


def test_an_adapter_beside_the_weights(dense_copy, no_leftovers):
    (dense_copy / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({"lora": torch.ones(1)}, dense_copy / "adapter_model.safetensors")
    refused(run(dense_copy, no_leftovers), 2, "adapter_config.json", "merge_and_unload()")


def test_an_adapter_alone(tmp_path, no_leftovers):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    result = run(folder, no_leftovers)
    refused(result, 2, "no config.json", "adapter_config.json", "merge_and_unload()")


# The types


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_types_that_cannot_be_carved(dense_copy, no_leftovers, name):
    kept = load_file(dense_copy / "model.safetensors")[name]
    kinds = {torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8", torch.float64: "F64"}
    for dtype, named in {**kinds, torch.bool: "BOOL"}.items():
        change_weights(dense_copy, lambda stored, to=dtype: stored.update({name: kept.to(to)}))
        refused(run(dense_copy, no_leftovers), 2, name, f"stored as {named}", "F32, F16, BF16")


def test_types_of_buffers_that_are_not_stored_again(
    own_dense, make_dense, carve, tmp_path, same_tensors
):
    folder = own_dense("pythia")
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    buffer = "gpt_neox.layers.0.attention.bias"
    change_weights(folder, lambda stored: stored.update({buffer: mask}))
    assert run(folder, tmp_path / "out").exit_code == 0
    assert same_tensors(tmp_path / "out", carve(make_dense("pythia")))


@pytest.mark.parametrize("family", ["llama-2", "qwen3-moe"])
def test_every_tensor_keeps_its_type(own_dense, tmp_path, tensors, family):
    folder, router = own_dense(family), "model.layers.1.mlp.gate.weight"

    def halve(stored):
        for name in [name for name in stored if "norm" not in name and name != router]:
            stored[name] = stored[name].to(torch.float16)

    change_weights(folder, halve)
    assert run(folder, tmp_path / "out").exit_code == 0
    before, after = tensors(folder), tensors(tmp_path / "out")
    if router in before:
        before[router.replace("weight", "parent_weight")] = before.pop(router)
    for name in before.keys() & after.keys():
        assert before[name].dtype == after[name].dtype and torch.equal(before[name], after[name])
    half = {name: tensor for name, tensor in after.items() if ".mlp.experts." in name}
    assert half and all(tensor.dtype == torch.float16 for tensor in half.values())


# The names


@pytest.mark.parametrize(("family", "prefix"), [("llama-3", "model."), ("pythia", "gpt_neox.")])
def test_the_prefix_of_the_base_model_may_be_missing(
    own_dense, make_dense, carve, tmp_path, same_tensors, family, prefix
):
    """As saved by the model without a head, into which a head was put, or to which it is tied."""
    folder = own_dense(family)
    rename(folder, lambda name: name.removeprefix(prefix))
    assert run(folder, tmp_path / "out").exit_code == 0
    assert same_tensors(tmp_path / "out", carve(make_dense(family)))


def test_a_base_model_without_a_head(dense_copy, no_leftovers):
    change_weights(dense_copy, lambda stored: stored.pop("lm_head.weight"))
    rename(dense_copy, lambda name: name.removeprefix("model."))
    refused(run(dense_copy, no_leftovers), 2, "no head (lm_head.weight)", "at random")


def test_a_tensor_under_two_names(dense_copy, no_leftovers):
    def repeat(stored):
        stored["norm.weight"] = stored["model.norm.weight"] + 1

    change_weights(dense_copy, repeat)
    result = run(dense_copy, no_leftovers)
    refused(result, 2, "both stand for model.norm.weight", "nobody can say which one counts")


@pytest.mark.parametrize("family", ["llama-3", "pythia"])
def test_a_model_saved_inside_a_wrapper(own_dense, no_leftovers, family):
    folder, before = own_dense(family), ""
    for prefix, wrapper in (
        ("_orig_mod.", "torch.compile"),
        ("module.", "DistributedDataParallel"),
        ("module._orig_mod.", "torch.compile"),
        ("_fsdp_wrapped_module.", "FSDP"),
        ("base_model.model.", "PEFT"),
    ):
        rename(folder, lambda name, old=before, new=prefix: new + name.removeprefix(old))
        refused(run(folder, no_leftovers), 2, wrapper, "Unwrap it")
        before = prefix


@pytest.mark.parametrize("family", relatives_last(["qwen3-moe", "olmoe"]))
def test_packed_experts_are_those_that_go_one_by_one(
    own_dense, make_dense, carve, tmp_path, same_tensors, family
):
    folder = own_dense(family)
    packed = Path(shutil.copytree(folder, tmp_path / "packed"))
    (packed / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(packed, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(packed / "model.safetensors")
    rename(packed, lambda name: name.removeprefix("model."))  # both layouts have it or not
    assert run(packed, tmp_path / "out").exit_code == 0
    assert same_tensors(tmp_path / "out", carve(make_dense(family)))


def test_no_more_of_packed_experts_is_read_than_one(own_dense, tmp_path):
    folder = own_dense("qwen3-moe")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder, save_original_format=False)
    expert = open_source(folder).read_expert(1, 3)
    assert {name: list(tensor.shape) for name, tensor in expert.items()} == {
        "gate_proj.weight": [96, 64],
        "up_proj.weight": [96, 64],
        "down_proj.weight": [64, 96],
    }
    for tensor in expert.values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    packed = model.model.layers[1].mlp.experts
    halves = torch.cat([expert["gate_proj.weight"], expert["up_proj.weight"]])
    assert torch.equal(halves, packed.gate_up_proj[3])
    assert torch.equal(expert["down_proj.weight"], packed.down_proj[3])


def test_packed_experts_of_another_size(own_dense, no_leftovers):
    folder = own_dense("qwen3-moe")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, save_original_format=False)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    packed = load_file(folder / "model.safetensors")[name]
    for changed, phrase in (
        (packed[:3].clone(), "lacks 2 tensors"),
        (torch.cat([packed, packed]), "holds 8 tensors"),
        (packed[:, :-1].contiguous(), "[95, 64]"),
    ):
        change_weights(folder, lambda stored, it=changed: stored.update({name: it}))
        refused(run(folder, no_leftovers), 2, phrase)


# The configuration


UNUSABLE = [
    ("rope_scaling", {"rope_type": "magic", "factor": 2.0}),
    ("rope_scaling", {"rope_type": "linear", "factor": "two"}),
    ("rope_parameters", "linear"),
    ("hidden_act", "magic"),
    ("hidden_act", None),
    ("num_attention_heads", 0),
    ("num_attention_heads", -4),
    ("num_attention_heads", 5),
    ("num_hidden_layers", 0),
    ("hidden_size", -64),
    ("intermediate_size", 0),
    ("vocab_size", "many"),
    ("vocab_size", 0),
    ("max_position_embeddings", 0),
    ("return_dict", False),
]
OF_A_FAMILY = {
    "llama-2": {"num_key_value_heads": [3, 0], "head_dim": [15, 0], "pad_token_id": [99999]},
    "pythia": {},
    "mistral-sliding": {"sliding_window": [0]},
    "qwen3-moe": {
        "num_experts": [0],
        "num_experts_per_tok": [0, 9],
        "moe_intermediate_size": [-4],
    },
}


@pytest.mark.parametrize("family", OF_A_FAMILY)
def test_a_configuration_that_the_library_cannot_build(
    own_dense, no_leftovers, edit_config, family
):
    folder = own_dense(family)
    whole = (folder / "config.json").read_text()
    own = [(field, value) for field, all_ in OF_A_FAMILY[family].items() for value in all_]
    for field, value in (*UNUSABLE, *own):
        (folder / "config.json").write_text(whole)
        edit_config(folder, **{field: value})
        if field == "rope_scaling":
            edit_config(folder, rope_parameters=None)
        said = ("config.json of", "not usable", field)
        if field in ("num_attention_heads", "num_key_value_heads", "head_dim") and value > 0:
            said = ("config.json",)  # as soon as something of it fits nowhere
        options = ["--dry-run"] if value == 0 else []
        refused(run(folder, no_leftovers, *options), 2, *said)


@pytest.mark.parametrize("family", ["llama-2", "qwen3-moe"])
def test_a_model_that_returns_more_than_logits(
    own_dense, make_dense, carve, edit_config, short_text, token_ids, family
):
    more = {"output_attentions": True, "output_hidden_states": True, "output_router_logits": True}
    folder, expected = own_dense(family), carve(make_dense(family))
    edit_config(folder, **more)
    got = carve(folder)
    written = json.loads((got / "config.json").read_text())
    assert {key: written[key] for key in more} == more
    stored = [path.read_bytes() for path in sorted(got.glob("*.safetensors"))]
    assert stored == [path.read_bytes() for path in sorted(expected.glob("*.safetensors"))]
    assert verify(got).differences == []
    measured = {"text": short_text, "sequence_length": 64}
    assert evaluate(got, **measured).perplexity == evaluate(expected, **measured).perplexity
    model = AutoModelForCausalLM.from_pretrained(got, attn_implementation="eager")
    outputs = model(token_ids)
    assert len(outputs.attentions) == 2 and len(outputs.hidden_states) == 3
    assert model.generate(token_ids, max_new_tokens=3).shape == (2, 35)


def test_a_window_that_is_switched_off_may_be_anything(own_dense, tmp_path, edit_config):
    folder = own_dense("qwen2")
    edit_config(folder, use_sliding_window=False, sliding_window=0)
    assert run(folder, tmp_path / "out").exit_code == 0


# The plan


@pytest.mark.parametrize(
    "family", relatives_last(["llama-2", "llama-3", "pythia", "qwen2", "qwen3-moe", "olmoe"])
)
def test_the_plan_counts_what_runs(make_dense, carve, tmp_path, family):
    folder = make_dense(family)
    planned = plan(folder, tmp_path / "out", shared=2, active=2, experts=8, **FEW)
    dense = AutoModelForCausalLM.from_pretrained(folder)
    assert planned.parameters == sum(parameter.numel() for parameter in dense.parameters())
    model = AutoModelForCausalLM.from_pretrained(carve(folder))
    config = model.config
    shares = {  # of what is stored, what runs for a token
        "mlp.experts.": config.num_experts_per_tok / config.num_experts,
        "mlp.shared_experts.": config.num_parents_per_tok / config.num_parents,
        "mlp.gate.parent_weight": 1,
        "mlp.gate.": 0,  # the plan counts no router
    }
    running = 0
    for name, parameter in model.named_parameters():
        share = next((share for part, share in shares.items() if part in name), 1)
        running += share * parameter.numel()
    assert planned.active_parameters == running
    table = 0 if config.tie_word_embeddings else dense.get_input_embeddings().weight.numel()
    picked = config.num_parents_per_tok / config.num_parents
    reads = sum(
        parameter.numel() * (picked if "mlp.experts." in name else 1)
        for name, parameter in dense.named_parameters()
    )
    assert planned.speedup_bound == pytest.approx((reads - table) / (running - table))
    assert planned.speedup_expected < planned.speedup_bound
