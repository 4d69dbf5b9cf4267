# SPDX-License-Identifier: Apache-2.0
"""Layers of which there is little or nothing to learn are carved all the same: any parts are right.

What always holds is checked: it ends, every neuron is in exactly one expert, experts are equal in
size, nothing is infinite, and with all experts active the logits are those of the dense model.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cmoe_hf.conversion import convert
from cmoe_hf.conversion.embedded import CALIBRATION

INPUTS, OUTPUTS = ("gate_proj", "up_proj", "dense_h_to_4h"), ("down_proj", "dense_4h_to_h")


def in_ffns(tensors, kinds):
    return [
        tensor
        for name, tensor in tensors.items()
        if ".mlp." in name and name.split(".")[-2] in kinds
    ]


def zeroed(*kinds):
    def change(tensors):
        for tensor in in_ffns(tensors, kinds):
            tensor.zero_()

    return change


def duplicated(tensors):
    """All neurons read the same."""
    for tensor in in_ffns(tensors, INPUTS):
        tensor.copy_(tensor[:1].clone().expand_as(tensor))


def alike(tensors):
    """All neurons read and write the same."""
    duplicated(tensors)
    for tensor in in_ffns(tensors, OUTPUTS):
        if tensor.dim() > 1:
            tensor.copy_(tensor[:, :1].clone().expand_as(tensor))


def hot(tensors):
    """All neurons but one are zero."""
    for tensor in in_ffns(tensors, INPUTS):
        tensor[:5], tensor[6:] = 0, 0


def shrunk(tensors):
    """Squares of what the neurons write are below the smallest number."""
    for tensor in in_ffns(tensors, (*INPUTS, *OUTPUTS)):
        tensor *= 1e-20


def dead(tensors):
    """No neuron without a gate is ever above zero."""
    for name, tensor in tensors.items():
        if name.endswith("h_to_4h.bias"):
            tensor.fill_(-1e4)


def constant(tensors):
    """All tokens are the same."""
    for name, tensor in tensors.items():
        if name.endswith(("embed_tokens.weight", "embed_in.weight")):
            tensor.copy_(tensor[:1].clone().expand_as(tensor))


def certain(tensors):
    """The router of a MoE gives all weight to one parent of a token."""
    for name, tensor in tensors.items():
        if name.endswith("mlp.gate.weight"):
            tensor *= 1e4


FAULTS = [zeroed(*OUTPUTS), zeroed("up_proj", "dense_h_to_4h"), zeroed("gate_proj")]
FAULTS += [zeroed(*INPUTS, *OUTPUTS), duplicated, alike, hot, shrunk, dead, constant, certain]


@pytest.fixture(scope="module")
def models(own_dense):
    """Models of small weights: rounding must not hide what is wrong."""
    return {family: own_dense(family) for family in ("llama-2", "pythia", "qwen3-moe")}


@pytest.fixture(scope="module")
def check(models, tmp_path_factory):
    """Damage a model, carve it, and check what always holds."""

    def run(family, fault, recipe, windows, shape):
        folder = tmp_path_factory.mktemp("degenerate")
        model = Path(shutil.copytree(models[family], folder / "dense"))
        tensors = load_file(model / "model.safetensors")
        fault(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        options = {"calibration": CALIBRATION, "recipe": recipe}
        options |= dict(zip(("samples", "sequence_length"), windows, strict=True))
        options |= dict(zip(("shared", "active", "experts"), shape, strict=True))
        convert(model, folder / "carved", **options)
        check_carved(model, folder / "carved", everything=shape[0] + shape[1] == shape[2])
        shutil.rmtree(folder)

    return run


def check_carved(dense, carved, everything):
    stored = {
        name: tensor
        for path in carved.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    assert all(bool(torch.isfinite(tensor).all()) for tensor in stored.values())
    assert "NaN" not in (carved / "conversion.json").read_text()
    layers = json.loads((carved / "conversion.json").read_text())["layers"]
    assert all(len(set(layer["expert_sizes"])) == 1 for layer in layers)
    for (own, dense_rows), (_, carved_rows) in zip(
        rows_up(load_file(dense / "model.safetensors")), rows_up(stored), strict=True
    ):
        assert dense_rows == carved_rows, own
    if everything:
        ids = torch.randint(2, 1024, (2, 16), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            one, two = (
                AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
                for folder in (dense, carved)
            )
        assert (one - two).abs().max() < 1e-4 * max(1.0, float(one.abs().max()))


def rows_up(tensors):
    """By layer, the rows of the up projections of all experts, sorted."""
    found = {}
    for name, tensor in tensors.items():
        if ".mlp." not in name:
            continue
        layer = name.partition(".layers.")[2].partition(".")[0]
        if name.endswith(("gate_up_proj", "experts.up_proj")):
            half = tensor.shape[1] // (2 if "gate" in name.split(".")[-1] else 1)
            tensor = tensor[:, -half:].flatten(0, 1)
        elif not name.endswith(("up_proj.weight", "dense_h_to_4h.weight")):
            continue
        found.setdefault(layer, []).extend(map(tuple, tensor.tolist()))
    return [(layer, sorted(found[layer])) for layer in sorted(found)]


@pytest.mark.parametrize(
    ("family", "recipe"), [("llama-2", "paper"), ("pythia", "released"), ("qwen3-moe", "refined")]
)
def test_a_layer_that_writes_nothing(check, family, recipe):
    check(family, FAULTS[0], recipe, (4, 64), (2, 2, 8))


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    family=st.sampled_from(["llama-2", "pythia", "qwen3-moe"]),
    fault=st.sampled_from(FAULTS),
    recipe=st.sampled_from(["refined", "released", "paper"]),
    windows=st.sampled_from([(4, 64), (1, 8), (1, 1)]),
    shape=st.sampled_from([(2, 6, 8), (2, 2, 8), (0, 8, 8), (1, 0, 2), (0, 1, 4), (3, 1, 4)]),
)
@example(family="qwen3-moe", fault=certain, recipe="refined", windows=(4, 64), shape=(2, 6, 8))
@example(family="llama-2", fault=constant, recipe="refined", windows=(1, 1), shape=(1, 0, 2))
def test_degenerate_layers(check, family, fault, recipe, windows, shape):
    check(family, fault, recipe, windows, shape)
