# SPDX-License-Identifier: Apache-2.0
"""Does a repository compute what it did when it was made, under whatever is installed?"""

import inspect
import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from families import decoders
from hub import TOKEN
from refusal import refused
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask
from typer.testing import CliRunner

from cmoe_hf.conversion import export, publish, upgrade, verify
from cmoe_hf.conversion.cli import app
from cmoe_hf.conversion.errors import CMoEError, RequestError
from cmoe_hf.conversion.folder import outputs
from cmoe_hf.conversion.folder.card import stated_hashes
from cmoe_hf.conversion.folder.layerwise import WorkFolder
from cmoe_hf.conversion.folder.remote_code import code_of_type
from cmoe_hf.conversion.folder.unfinished import sha256_of
from cmoe_hf.modeling_cmoe import TESTED, CMoERouter

pytestmark = pytest.mark.library

OLD = Path(__file__).parent / "fixtures" / "carved-0.1.0"
"""Carved by commit 35f28d9 under transformers 5.23, whose code forgets the cache under 5.24."""
FORGETS = "it generates something else with the cache than without"


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def old(tmp_path):
    """A copy of the repository that an older release has carved."""
    return Path(shutil.copytree(OLD, tmp_path / "old"))


@pytest.fixture
def carved_copy(carved, tmp_path):
    """A carved repository that a test may damage."""
    return Path(shutil.copytree(carved, tmp_path / "carved"))


def edit_weights(folder, change):
    """Change tensors of every file of a repository."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})


def weights(folder):
    return {path.name: sha256_of(path) for path in sorted(folder.glob("*.safetensors"))}


def test_a_new_repository_is_as_carved(carved):
    result = invoke("verify", carved)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("as carved: out under transformers ")
    assert len(result.stdout.splitlines()) == 1


def test_the_fingerprint_is_what_the_model_computes(carved):
    stated = json.loads((carved / "conversion.json").read_text())["fingerprint"]
    model = AutoModelForCausalLM.from_pretrained(carved, dtype=torch.float32).eval()
    [first, second], ids = stated["prompts"], stated["prompts"][0][:]
    assert len(first) != len(second)
    with torch.no_grad():
        likeliest = model(torch.tensor([ids])).logits[0, -4:].log_softmax(-1).topk(5)
        for _ in range(32):
            logits = model(torch.tensor([ids]), use_cache=False).logits
            ids.append(logits[0, -1].argmax().item())
    assert stated["likeliest"] == likeliest.indices.tolist()
    wanted = likeliest.values
    torch.testing.assert_close(torch.tensor(stated["log_probabilities"]), wanted, atol=1e-4, rtol=0)
    assert stated["generated"] == ids[len(first) :]


def double_experts(tensors):
    for name, tensor in tensors.items():
        if "experts.down_proj" in name:
            tensor.mul_(2)


def fill_with_nan(tensors):
    for tensor in tensors.values():
        tensor.fill_(torch.nan)


def test_changed_weights_are_not_as_carved_nor_published_nor_upgraded(carved_copy):
    edit_weights(carved_copy, double_experts)
    files = {path.name: path.read_bytes() for path in carved_copy.iterdir()}
    with pytest.raises(RequestError, match=r"not as carved: .*cmoe upgrade"):
        publish(carved_copy, "org/x", licence="mit", base_model="org/dense")
    with pytest.raises(CMoEError, match="was not upgraded: its likeliest tokens"):
        upgrade(carved_copy)
    assert {path.name: path.read_bytes() for path in carved_copy.iterdir()} == files
    assert [path.name for path in carved_copy.parent.iterdir()] == ["carved"]
    result = invoke("verify", carved_copy, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["as_carved"] is False and found["fingerprint"] is True
    assert "other log-probabilities" in found["differences"][0]
    edit_weights(carved_copy, fill_with_nan)
    assert not verify(carved_copy).as_carved


@pytest.mark.parametrize("family", ["pythia", "qwen3-moe", *decoders()])
def test_large_models_are_read_from_the_disk(make_dense, carve, monkeypatch, family):
    carved = carve(make_dense(family))
    monkeypatch.setattr(outputs, "IN_MEMORY", 0)
    assert "disk" in outputs.placement(carved).values()
    assert verify(carved).as_carved


def test_a_damaged_repository_is_not_run(carved_copy):
    record = json.loads((carved_copy / "conversion.json").read_text())
    generated = record["fingerprint"].pop("generated")
    (carved_copy / "conversion.json").write_text(json.dumps(record))
    refused(invoke("verify", carved_copy), 2, "the fingerprint in conversion.json")
    record["fingerprint"]["generated"] = generated
    (carved_copy / "conversion.json").write_text(json.dumps(record))
    edit_weights(carved_copy, lambda tensors: tensors.pop("model.norm.weight", None))
    with pytest.raises(CMoEError, match=r"cannot be run under .*'model\.norm\.weight'"):
        verify(carved_copy)


def test_foreign_code_runs_only_if_it_is_trusted(carved_copy):
    code = carved_copy / "modeling_cmoe.py"
    code.write_text(code.read_text() + "\nraise RuntimeError('it has run')\n")
    refused(invoke("verify", carved_copy), 2, "modeling_cmoe.py", "--trust-remote-code")
    with pytest.raises(CMoEError, match="it has run"):
        verify(carved_copy, trust_remote_code=True)


def test_code_of_another_repository_is_foreign(old, edit_config):
    edit_config(old, auto_map={"AutoModelForCausalLM": "org/evil--modeling_evil.Model"})
    with pytest.raises(RequestError, match="modeling_evil"):
        verify(old)


@pytest.mark.thorough
def test_an_old_repository_is_found_out_and_mended(old):
    (old / "notes").mkdir()
    (old / "notes" / "mine.txt").write_text("kept")
    before, fields = weights(old), json.loads((old / "config.json").read_text())
    ids = torch.arange(2, 34)[None]
    expected = AutoModelForCausalLM.from_pretrained(old)(ids).logits
    found = verify(old)
    if "past_key_values" in inspect.signature(create_causal_mask).parameters:
        assert found.as_carved and not found.fingerprint
    else:
        assert not found.as_carved and FORGETS in found.line

    result = upgrade(old)
    assert set(result.changed) >= {"modeling_cmoe.py", "conversion.json", "README.md"}
    assert result.verification.startswith("as carved: old under transformers ")
    assert weights(old) == before == result.weights
    today = code_of_type("cmoe_llama")
    assert {name: (old / name).read_text() for name in today} == today
    assert stated_hashes((old / "README.md").read_text()) == {
        name: sha256_of(old / name) for name in today
    }
    after = json.loads((old / "config.json").read_text())
    assert {name: after[name] for name in fields} == {
        **fields,
        "transformers_version": transformers.__version__,
    }
    assert (old / "notes" / "mine.txt").read_text() == "kept"
    assert torch.equal(AutoModelForCausalLM.from_pretrained(old)(ids).logits, expected)
    assert [path.name for path in old.parent.iterdir()] == ["old"]

    again = invoke("upgrade", old, "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["changed"] == []


def test_an_upgrade_that_was_killed_at_its_last_step_goes_on(carved_copy):
    partial = carved_copy.with_name("carved.partial")
    partial.mkdir()
    carved_copy.rename(partial / "replaced")
    assert upgrade(carved_copy).changed == []
    assert [path.name for path in carved_copy.parent.iterdir()] == ["carved"]


def test_an_upgrade_removes_no_unfinished_work(carved_copy):
    with (
        pytest.raises(KeyboardInterrupt),
        WorkFolder.create(carved_copy, {}, overwrite=True) as work,
    ):
        work.create_weights({"x": torch.ones(1)}, 1000)
        work.write_rest({"x": torch.ones(1)})
        work.figures.append({})
        raise KeyboardInterrupt
    kept = {path: path.read_bytes() for path in work.folder.rglob("*.safetensors")}
    refused(invoke("upgrade", carved_copy), 2, "carved.partial beside the model", "--resume")
    assert kept and {path: path.read_bytes() for path in kept} == kept


def test_only_carved_models_are_upgraded(dense):
    refused(invoke("upgrade", dense), 2, "is a llama model, not a carved one")


def test_an_export_has_a_fingerprint_of_its_own(embedded, carve, tmp_path):
    export(carve(embedded, (1, 1, 8)), tmp_path / "native")
    found = verify(tmp_path / "native")
    assert found.as_carved and found.fingerprint


def test_the_tested_range_is_what_the_package_declares():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    [declared] = [it for it in project["project"]["dependencies"] if it.startswith("transformers")]
    low, (major, minor) = TESTED[0], map(int, TESTED[1].split("."))
    assert declared == f"transformers>={low},<{major}.{minor + 1}"


def test_a_repository_with_names_of_before_loads_verifies_and_is_renamed(tmp_path):
    """Carved by commit 601a904: GPT-NeoX, whose tensors had Llama's names."""
    old = Path(shutil.copytree(OLD.with_name("carved-0.2.0"), tmp_path / "old"))
    ids = torch.arange(2, 34).view(2, 16)
    before = load_file(old / "model.safetensors")
    model, info = AutoModelForCausalLM.from_pretrained(old, output_loading_info=True)
    assert "model.embed_tokens.weight" in before and not any(info.values())
    expected = model(ids).logits
    assert verify(old).as_carved
    upgrade(old)
    after = load_file(old / "model.safetensors")
    assert "gpt_neox.embed_in.weight" in after and len(after) == len(before)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(old)(ids).logits, expected)
    assert verify(old).as_carved
    assert json.loads((old / "config.json").read_text())["ffn"]["up_bias"]


@pytest.mark.thorough
def test_a_hub_id_is_verified_and_upgraded_by_a_pull_request(hub, old, monkeypatch):
    hub.reset()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    card = old / "README.md"
    card.write_text(card.read_text().replace("base_model: pico", "base_model: org/pico"))
    hub.publish("org/old", old)
    main = dict(hub.repositories["org/old"].files("main"))
    result = upgrade("org/old")
    assert result.output.endswith("/org/old/discussions/1")
    assert result.verification.startswith("as carved: old under transformers ")
    assert hub.repositories["org/old"].files("main") == main
    proposed = hub.repositories["org/old"].files("refs/pr/1")
    today = code_of_type("cmoe_llama")
    assert {name: proposed[name].decode() for name in today} == today
    assert {name: it for name, it in proposed.items() if name.endswith(".safetensors")} == {
        name: it for name, it in main.items() if name.endswith(".safetensors")
    }
    hub.repositories["org/old"].commit("main", proposed)
    assert verify("org/old").as_carved
    hub.reset()


def test_a_tiny_context_is_enough(make_dense, carve):
    carved = carve(make_dense(max_position_embeddings=32), sequence_length=32)
    assert verify(carved).as_carved


def test_experts_that_rounding_chooses_are_no_fault_of_cache_or_padding(carved, monkeypatch):
    """Scores may be so close that a batch and its sequences alone get other experts."""

    def pick(router, value_TN, x_TH):
        return torch.rand_like(value_TN).topk(router.top_k, dim=-1).indices

    monkeypatch.setattr(CMoERouter, "pick", pick)
    found = outputs.model_outputs(carved, [list(range(5, 35)), list(range(40, 60))])
    assert max(found["differences"][name] for name in ("cached", "padded")) < outputs.TOLERANCE
