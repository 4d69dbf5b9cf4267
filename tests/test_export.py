# SPDX-License-Identifier: Apache-2.0
"""Export to a stock architecture: the same function, loaded without a line of ours."""

import json
import subprocess
import sys

import pytest
import torch
from recipes import FIRST_EDITION
from refusal import refused
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cmoe_hf.conversion import Recipe, RequestError, export
from cmoe_hf.conversion.cli import app
from cmoe_hf.conversion.embedded import CALIBRATION
from cmoe_hf.conversion.measure.routing import collected
from cmoe_hf.conversion.share.export import chosen_by, routers_of
from cmoe_hf.conversion.share.targets import TARGETS
from cmoe_hf.conversion.source.stored import read_json

pytestmark = pytest.mark.library

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
AutoTokenizer.from_pretrained(sys.argv[1])
assert not any(name.startswith("cmoe_hf") for name in sys.modules)
torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


FITTING = {
    "llama-2": {"granite", "glm4", "ernie", "qwen2"},
    "llama-3": {"granite", "glm4", "ernie", "qwen2"},
    "mistral": {"granite", "glm4", "ernie", "qwen2"},
    "mistral-sliding": {"qwen2"},
    "qwen2": {"granite", "glm4", "qwen2"},
    "qwen2-sliding": {"qwen2"},
    "qwen3": {"glm4"},
}
"""Which architectures represent a family with a shared expert."""
FEW = ("llama-3", "qwen2", "qwen3")


def check_logits(carved, native, token_ids, tolerance):
    """Both compute the same. Returns the stock model."""
    loaded, info = AutoModelForCausalLM.from_pretrained(
        native, dtype="float32", output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        expected, got = load(carved)(token_ids).logits, loaded.eval()(token_ids).logits
    far_BS = ((got - expected).abs() > tolerance * expected.abs().max()).any(dim=-1)
    # Behind one close decision that a scaled softmax rounded otherwise, every token differs.
    assert far_BS.float().mean() <= (0 if tolerance < 1e-4 else 0.25), far_BS
    return loaded


@pytest.mark.parametrize(
    "family",
    [it if it in FEW else pytest.param(it, marks=pytest.mark.thorough) for it in FITTING],
)
def test_every_architecture_that_fits_computes_the_same(
    make_dense, carve, token_ids, tmp_path, family
):
    for notation in ((1, 1, 8), (3, 3, 8)) if family in ("llama-3", "qwen3") else ((1, 1, 8),):
        carved = carve(make_dense(family), notation, recipe=FIRST_EDITION)
        for name, target in TARGETS.items():
            out = tmp_path / f"{name}-{notation}"
            if name not in FITTING[family]:
                with pytest.raises(RequestError, match=f"cannot be exported: {name} "):
                    export(carved, out, to=name)
                continue
            result = export(carved, out, to=name)
            assert result.architecture == target.config_class.model_type
            # With one active expert its weight is exactly 1; otherwise 1/A but for the scale.
            exact = notation[1] == 1 or name == "granite"
            check_logits(carved, out, token_ids, 2e-5 if exact else 2e-3)
            if name == "glm4":  # vLLM would not take the embeddings for a head
                assert "lm_head.weight" in load_file(out / "model.safetensors")


@pytest.mark.parametrize(("notation", "to"), [((0, 2, 8), None), ((2, 6, 8), "glm4")])
def test_nothing_shared_or_everything_active(dense, carve, token_ids, tmp_path, notation, to):
    carved = carve(dense, notation, recipe=FIRST_EDITION)
    for name in [to] if to else ["granite", "glm4", "ernie", "qwen2"]:
        export(carved, tmp_path / name, to=name)
        check_logits(carved, tmp_path / name, token_ids, 2e-3)


@pytest.mark.parametrize("active", [1, 3])
def test_a_qwen3_without_shared_expert_becomes_a_qwen3_moe(
    make_dense, carve, token_ids, tmp_path, active
):
    carved = carve(make_dense("qwen3"), (0, active, 8), recipe=FIRST_EDITION)
    result = export(carved, tmp_path / "native", to="qwen3")
    assert result.architecture == "qwen3_moe"
    check_logits(carved, tmp_path / "native", token_ids, 1e-5 if active == 1 else 2e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_most_faithful_is_chosen(dense, carve, tmp_path, dtype):
    result = export(carve(dense, dtype=dtype), tmp_path / "native")
    chosen = {"float32": "granitemoeshared", "bfloat16": "glm4_moe"}
    assert result.architecture == chosen[dtype] and "in float32" in result.reason
    # 12 neurons in 16 bits are no multiple of 16 bytes: grouped kernels cannot run them.
    assert result.dtype == dtype and result.max_abs_logit_difference < 0.1


@pytest.mark.parametrize(
    ("dense_layers", "chosen"), [((0,), "glm4_moe"), ((0, 3), "ernie4_5_moe"), ((1,), "qwen2_moe")]
)
def test_dense_layers_go_where_there_is_a_place_for_them(
    make_dense, carve, token_ids, tmp_path, dense_layers, chosen
):
    deep = make_dense(num_hidden_layers=4)
    carved = carve(deep, (2, 1, 8), recipe=FIRST_EDITION, dense_layers=dense_layers)
    result = export(carved, tmp_path / "native")
    assert result.architecture == chosen
    check_logits(carved, tmp_path / "native", token_ids, 2e-5)


@pytest.mark.parametrize("to", ["glm4", "ernie"])
def test_pinned_experts_stay_pinned(dense, carve, token_ids, tmp_path, to):
    carved = carve(dense, (2, 3, 8), recipe=Recipe.of(FIRST_EDITION, pinned=2))
    export(carved, tmp_path / "native", to=to)
    native = check_logits(carved, tmp_path / "native", token_ids, 2e-3)
    with collected(routers_of(native), lambda *it: chosen_by(it[2])) as chosen:
        native(token_ids)
    for [index_TK] in chosen:
        assert (index_TK[:, :2] == torch.tensor([0, 1])).all()


def test_what_vllm_does_not_read_is_said(make_dense, dense, carve, token_ids, tmp_path, caplog):
    qwen2 = carve(make_dense("qwen2"), (1, 1, 8), dtype="float32")
    assert export(qwen2, tmp_path / "best").architecture == "glm4_moe"
    assert read_json(tmp_path / "best" / "config.json")["head_dim"] == 16
    assert "vLLM" not in caplog.text
    export(qwen2, tmp_path / "granite", to="granite")
    assert "vLLM 0.32 does not read the biases of queries" in caplog.text
    pinned = carve(dense, (2, 3, 8), recipe=Recipe.of(FIRST_EDITION, pinned=2))
    export(pinned, tmp_path / "ernie", to="ernie")
    assert "the always-on experts (--budget) of a Ernie4_5_MoeForCausalLM" in caplog.text


@pytest.mark.thorough
def test_it_loads_in_a_process_without_this_package(carved, token_ids, tmp_path):
    export(carved, tmp_path / "native")
    assert not list((tmp_path / "native").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "native" / "config.json").read_text())
    torch.save(token_ids, tmp_path / "ids.pt")
    arguments = [tmp_path / "native", tmp_path / "ids.pt", tmp_path / "logits.pt"]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = load(tmp_path / "native")(token_ids).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)


def test_the_card_no_longer_speaks_of_remote_code(carved, tmp_path):
    result = CliRunner().invoke(app, ["export", str(carved), str(tmp_path / "native"), "--json"])
    assert result.exit_code == 0, result.stderr
    assert {"output", "architecture", "max_abs_logit_difference"} <= json.loads(
        result.stdout
    ).keys()
    card = (tmp_path / "native" / "README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained(repo)" in card and "SHA-256" not in card
    assert "custom_code" not in card.split("---")[1]
    assert "## Stock architecture" in card and card.index("## Stock") < card.index("## Licence")


def test_experts_without_a_gate_have_no_stock_architecture(make_dense, carve, no_leftovers):
    folder = carve(make_dense("pythia"), (1, 1, 8))
    with pytest.raises(RequestError, match="experts without a gate"):
        export(folder, no_leftovers)


def change(folder, suffix, value, tmp_path):
    """A copy of a carved model with one tensor of each layer set."""
    copy = tmp_path / "changed"
    copy.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (copy / path.name).write_bytes(path.read_bytes())
            continue
        tensors = load_file(path)
        for name in tensors:
            if name.endswith(suffix):
                tensors[name][0] = value
        save_file(tensors, copy / path.name, metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("suffix", "phrase"),
    [
        ("mlp.gate.scale", "trained gate scale (recover with --router-learning-rate 0)"),
        ("mlp.gate.balance_bias", "trained balance_bias (recover with --bias-speed 0)"),
    ],
)
def test_gates_that_learned_are_refused(carved, tmp_path, suffix, phrase):
    changed = change(carved, suffix, 0.1, tmp_path)
    with pytest.raises(RequestError) as refusal:
        export(changed, tmp_path / "native")
    assert phrase in str(refusal.value)
    assert not (tmp_path / "native").exists()


def test_a_trained_balance_among_which_one_expert_runs(dense, carve, token_ids, tmp_path):
    """Then no weight depends on the softmax, which can stay as it is."""
    carved = carve(dense, (2, 1, 8), recipe=FIRST_EDITION)
    changed = change(carved, "mlp.gate.balance_bias", 0.2, tmp_path)
    assert export(changed, tmp_path / "native").architecture == "ernie4_5_moe"
    check_logits(changed, tmp_path / "native", token_ids, 2e-5)


def test_bad_requests(carved, dense, make_dense, carve, tmp_path):
    def invoke(model, *arguments):
        command = ["export", model, tmp_path / "out", *arguments]
        return CliRunner().invoke(app, [str(argument) for argument in command])

    few = {"calibration": CALIBRATION, "samples": 4, "sequence_length": 64}
    refused(invoke(carve(dense, recipe="paper", **few)), 2, "router is representative", "refined")
    refused(invoke(carve(dense, recipe="released", **few)), 2, "absolute values")
    refused(invoke(carve(dense, (4, 0, 8))), 2, "does not route")
    refused(invoke(dense), 2, "not a carved one")
    qwen3 = carve(make_dense("qwen3"), (1, 1, 8))
    refused(invoke(qwen3, "--to", "qwen3"), 2, "qwen3 has no shared expert. glm4 represents it")
    refused(invoke(carved, "--to", "mixtral"), 2, "no export to 'mixtral'")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    refused(invoke(carved), 2, "out exists already")
