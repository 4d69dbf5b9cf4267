# SPDX-License-Identifier: Apache-2.0
"""Layers that stay dense: as they are in the source, and everything else works around them."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cmoe_hf.conversion import RequestError, benchmark, convert, evaluate, export, plan, report
from cmoe_hf.conversion.carve.shape import Shape, engines_of_width
from cmoe_hf.conversion.embedded import CALIBRATION

FEW = {"calibration": CALIBRATION, "samples": 4, "sequence_length": 64}
FAMILIES = ["llama-2", "pythia", "qwen3"]


def logits(folder, token_ids):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(token_ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_layer_is_that_of_the_source(make_dense, carve, token_ids, family):
    source = make_dense(family)
    folder = carve(source, dense_layers="0")
    before, after = (load_file(path / "model.safetensors") for path in (source, folder))
    first = {name for name in after if ".layers.0." in name}
    assert any("mlp" in name for name in first)
    for name in first:
        assert torch.equal(
            after[name],
            before[name.replace("model.layers", "gpt_neox.layers")]
            if family == "pythia"
            else before[name],
        )
    config = json.loads((folder / "config.json").read_text())
    assert config["dense_layers"] == [0]
    layers = json.loads((folder / "conversion.json").read_text())
    assert layers["layers"][0]["dense"] and layers["result"]["activation_ratio"] == 0.75
    assert "layers 0 stay dense." in " ".join((folder / "README.md").read_text().split())
    exact = carve(source, (2, 6, 8), dense_layers=(1,))
    torch.testing.assert_close(
        logits(exact, token_ids), logits(source, token_ids), rtol=1e-4, atol=1e-4
    )


def test_the_verbs_know_dense_layers(dense, carve, tmp_path, calibration_text):
    folder = carve(dense, dense_layers="1")
    measured = evaluate(folder, baseline=dense, text=calibration_text, windows=2)
    assert measured.router_oracle_agreement is not None
    timed = benchmark(folder, baseline=dense, tokens=[1], prefill=[8], batch=[1], rounds=2)
    assert timed.ffn and timed.prefill and timed.decode
    exported = export(folder, tmp_path / "native")
    assert exported.max_abs_logit_difference < 1e-2
    page = report(folder, text=calibration_text, windows=2, output=tmp_path / "page")
    assert page.perplexity > 1
    planned = plan(dense, tmp_path / "out", shared=2, active=2, experts=8, dense_layers="1", **FEW)
    assert planned.activation_ratio == 0.75


@pytest.mark.parametrize(
    ("layers", "message"),
    [("2", "no layer 2"), ("-1", "no layer -1"), ("0,1", "every layer dense"), ("x", "no numbers")],
)
def test_layers_that_cannot_stay_dense_are_refused(dense, no_leftovers, layers, message):
    with pytest.raises(RequestError, match=message):
        convert(dense, no_leftovers, shared=2, active=2, experts=8, dense_layers=layers, **FEW)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.9])
def test_a_budget_alone_chooses_experts_and_what_stays_dense(make_dense, tmp_path, budget):
    deep = make_dense(num_hidden_layers=12, intermediate_size=128)
    planned = plan(deep, tmp_path / "out", budget=budget, **FEW)
    assert budget - 0.1 < planned.activation_ratio <= budget
    assert planned.expert_width == 8
    made = convert(deep, tmp_path / "out", budget=budget, **FEW)
    assert made.activation_ratio == planned.activation_ratio
    layers = json.loads((tmp_path / "out" / "conversion.json").read_text())["layers"]
    assert [layer.get("dense", False) for layer in layers] == [True] + [False] * 11


@pytest.mark.parametrize(
    ("width", "experts", "fits"),
    [
        (1536, 48, "fits Q8_0 and Q4_0, grouped kernels"),
        (6912, 36, "fits Q8_0 and Q4_0, grouped kernels"),  # not 48 of 144
        (11008, 43, "fits Q4_K, Q8_0 and Q4_0, grouped kernels"),
        (128, 16, "fits grouped kernels"),  # not 4 of 32
    ],
)
def test_experts_of_a_budget_are_as_wide_as_engines_like(width, experts, fits):
    assert Shape.spread(0.5, 26, width, None)[0].experts == experts
    assert engines_of_width(width // experts) == fits
    assert engines_of_width(12) == "fits no grouped kernel"


@pytest.mark.parametrize("budget", [0.01, 1.0, float("nan")])
def test_a_budget_that_no_shape_has_is_refused(dense, no_leftovers, budget):
    with pytest.raises(RequestError, match="cannot be had in 2 layers"):
        plan(dense, no_leftovers, budget=budget, **FEW)
