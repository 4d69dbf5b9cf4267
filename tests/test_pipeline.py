# SPDX-License-Identifier: Apache-2.0
"""Carving: exact where it must be, and seeing in calibration what the model computes later."""

import json
import shutil

import pytest
import torch
from families import FAMILIES, relatives_last
from recipes import FIRST_CHANGES
from transformers import AutoModelForCausalLM, AutoTokenizer

from cmoe_hf.conversion import convert, evaluate
from cmoe_hf.conversion.carve import decoder, pipeline, split
from cmoe_hf.conversion.carve.recipe import RECIPES, Recipe
from cmoe_hf.conversion.embedded import CALIBRATION
from cmoe_hf.conversion.source.calibration import apart_windows, tokenize

BACKENDS = ["eager", "batched_mm", "grouped_mm"]


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@pytest.mark.parametrize("recipe", [*RECIPES, Recipe.of("refined", always_on=2)])
@pytest.mark.parametrize("notation", [(0, 8, 8), (3, 5, 8), (1, 3, 4)])
def test_with_all_experts_active_the_embedded_model_is_the_dense_one(
    embedded, carve, recipe, notation, token_ids
):
    carved = load(carve(embedded, notation, recipe=recipe))
    with torch.no_grad():
        expected = load(embedded)(token_ids).logits
        for backend in BACKENDS:
            carved.set_experts_implementation(backend)
            assert (carved(token_ids).logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", relatives_last(FAMILIES))
def test_all_active_equals_dense_in_every_family_and_precision(
    make_dense, carve, family, dtype, token_ids, tmp_path
):
    source = shutil.copytree(make_dense(family), tmp_path / family)
    source_model = AutoModelForCausalLM.from_pretrained(source).to(getattr(torch, dtype))
    source_model.save_pretrained(source)
    carved_folder = carve(source, (2, 6, 8))
    stored = json.loads((carved_folder / "config.json").read_text())
    assert stored["dtype"] == dtype
    with torch.no_grad():
        # In float32 both, so that only the arithmetic of carving could differ.
        expected = load(source)(token_ids).logits
        assert (load(carved_folder)(token_ids).logits - expected).abs().max() < 1e-4 * max(
            1.0, expected.abs().max().item()
        )


@pytest.mark.parametrize("always_on", [1, 2])
def test_experts_always_on_run_for_every_token(embedded, carve, token_ids, always_on):
    """They are shared experts in all but name: the same model as with a larger shared expert."""
    # Without the refit: its roundings to bfloat16 differ, and so do the next layer's clusters.
    plain = Recipe.of("refined", refit=False)
    folder = carve(embedded, (1, 2, 8), recipe=Recipe.of(plain, always_on=always_on))
    larger = load(carve(embedded, (1 + always_on, 2 - always_on, 8), recipe=plain))
    model = load(folder)
    for layer in json.loads((folder / "conversion.json").read_text())["layers"]:
        assert layer["pinned_experts"] == always_on
        assert layer["expert_loads"][:always_on] == [1.0] * always_on
    with torch.no_grad():
        difference = model(token_ids).logits - larger(token_ids).logits
    assert difference.abs().max() < 1e-4
    assert model.config.always_on_experts == [[*range(always_on)]] * 4
    stored = model.model.layers[0].mlp.gate.balance_bias
    assert (stored != 0).tolist() == [True] * always_on + [False] * (7 - always_on)


def test_choices_of_older_releases_are_read():
    assert Recipe.of("refined", pinned=1) == Recipe.of("refined", always_on=1)


@pytest.mark.parametrize("enough", [True, False])
@pytest.mark.parametrize("notation", [(2, 2, 8), (1, 1, 8)])
def test_what_a_split_was_tried_with_is_what_that_split_alone_gives(
    embedded, tmp_path, tensors, monkeypatch, notation, enough
):
    """Where the trial has seen all tokens its refit is kept; else the layer is refitted."""
    if not enough:
        for module in (pipeline, split):
            monkeypatch.setattr(module, "PROFILED_TOKENS", 128)
    shape = dict(zip(("shared", "active", "experts"), notation, strict=True))
    settings = {**shape, "calibration": CALIBRATION, "samples": 4, "sequence_length": 64}
    adaptive = Recipe.of("refined", adaptive_split=True)
    convert(embedded, tmp_path / "a", recipe=adaptive, **settings)
    report = json.loads((tmp_path / "a" / "conversion.json").read_text())
    chosen = report["layers"][0]["pinned_experts"]
    fixed = {"always_on": chosen} | ({"max_iterations": 1} if chosen else {})
    convert(embedded, tmp_path / "b", recipe=Recipe.of("refined", **fixed), **settings)
    first, second = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    names = [name for name in first if name.startswith("model.layers.0.")]
    assert names and all(torch.equal(first[name], second[name]) for name in names)


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_neuron_is_lost_or_doubled(dense, carve, tensors, recipe):
    folder = carve(dense, (2, 2, 8), recipe=recipe)
    before, after = tensors(dense), tensors(folder)
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp."
        gate_NMH, up_NMH = after[mlp + "experts.gate_up_proj"].chunk(2, dim=1)
        down_NHM = after[mlp + "experts.down_proj"]
        pieces = {
            "gate_proj": gate_NMH.flatten(0, 1),
            "up_proj": up_NMH.flatten(0, 1),
            "down_proj": down_NHM.transpose(1, 2).flatten(0, 1),
        }
        neurons = []
        for name, routed_RH in pieces.items():
            shared = after[mlp + f"shared_expert.{name}.weight"]
            whole = before[mlp + f"{name}.weight"]
            shared, whole = (shared.T, whole.T) if name == "down_proj" else (shared, whole)
            rows = torch.cat([shared, routed_RH])
            # Which dense neuron each row is: exact copies, each used once, the same in all three.
            if name == "down_proj" and RECIPES[recipe].refit:
                assert rows.shape == whole.shape
                continue
            index = (rows[:, None] == whole[None]).all(dim=2).int().argmax(dim=1)
            assert torch.equal(whole[index], rows)
            neurons.append(index.tolist())
        assert sorted(neurons[0]) == list(range(96))
        assert all(placed == neurons[0] for placed in neurons)


def test_tensors_outside_the_ffn_are_untouched(dense, carved, tensors):
    before, after = tensors(dense), tensors(carved)
    kept = {name for name in before if ".mlp." not in name}
    assert kept == {name for name in after if ".mlp." not in name}
    for name in kept:
        assert torch.equal(before[name], after[name])


def test_each_layer_is_profiled_on_what_the_carved_layers_before_it_produce(
    embedded, calibration_text, carve
):
    """The errors that calibration reports are those of the finished model on the same windows."""
    folder = carve(embedded, (2, 2, 8), samples=4, sequence_length=64, seed=3)
    ids = tokenize(AutoTokenizer.from_pretrained(embedded), calibration_text.read_text())
    windows_WL = apart_windows(ids, samples=4, length=64, seed=3)
    carved, dense = load(folder), load(embedded)
    outputs = {}
    for index, layer in enumerate(carved.model.layers):
        layer.mlp.register_forward_hook(
            lambda module, args, output, index=index: outputs.update({index: (args[0], output)})
        )
    with torch.no_grad():
        carved(windows_WL)
        report = json.loads((folder / "conversion.json").read_text())
        for index, layer in enumerate(report["layers"]):
            x, y = outputs[index]
            expected = dense.model.layers[index].mlp(x)
            error = ((y - expected).norm() / expected.norm()).item()
            assert layer["relative_output_error"] == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("experts", [4, 6, 12])
def test_layer_figures_are_consistent(dense, carve, recipe, experts):
    report = json.loads(
        (carve(dense, (1, 2, experts), recipe=recipe) / "conversion.json").read_text()
    )
    assert len(report["layers"]) == 2
    for layer in report["layers"]:
        assert layer["expert_sizes"] == [96 // experts] * (experts - 1)
        assert layer["shared_neurons"] == 96 // experts
        assert sum(layer["expert_loads"]) == pytest.approx(2)
        rate = layer["activation_rate"]
        assert 0 <= rate["min"] <= rate["q25"] <= rate["median"] <= rate["q75"] <= rate["max"] <= 1
        assert 0 < layer["marks_on_shared"] <= 1
        assert 0 < layer["relative_output_error"] < 1.5
        assert layer["seconds"]["carving_pass"] > layer["seconds"]["bare_forward"] > 0


def test_the_error_falls_to_zero_as_more_experts_run(embedded, carve):
    errors = []
    for active in (0, 2, 4, 6):
        report = json.loads((carve(embedded, (2, active, 8)) / "conversion.json").read_text())
        errors.append(report["result"]["relative_output_error"])
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] < 1e-5


def test_each_step_of_the_refined_recipe_can_be_switched(embedded, carve):
    def error(**changes):
        changes = {**FIRST_CHANGES, **changes}
        recipe = Recipe.of("refined", **changes)
        folder = carve(embedded, (1, 1, 8), samples=16, sequence_length=256, recipe=recipe)
        report = json.loads((folder / "conversion.json").read_text())
        told = ", ".join(f"{name} = {report['recipe'][name]}" for name in changes)
        assert report["settings"]["recipe"].split(" with ")[0] == "refined"
        assert set(report["settings"]["recipe"][13:].split(", ")) == set(told.split(", "))
        assert report["recipe"].items() >= changes.items()
        return report["result"]["relative_output_error"]

    plain = {"refit": False, "error_correction": False}
    assert error(error_correction=False) < error(**plain)
    assert error(**plain) < error(importance="rate", **plain)
    assert error(**plain) < error(clusters="marks", router="representative", **plain)


@pytest.mark.thorough
def test_refined_is_better_than_the_papers_recipes_and_than_static_pruning(
    embedded, carve, held_out
):
    def measured(recipe, notation=(1, 1, 8)):
        options = {"samples": 32, "sequence_length": 256}
        folder = carve(embedded, notation, recipe=recipe, **options)
        return evaluate(folder, text=held_out, dtype="float32").perplexity

    refined = measured("refined")
    assert refined < measured("refined", (2, 0, 8))
    assert refined < 0.7 * measured("paper")
    assert refined < 0.7 * measured("released")


@pytest.mark.parametrize("notation", [(1, 1, 8), (2, 2, 8), (3, 3, 8)])
@pytest.mark.thorough
def test_a_budget_is_as_good_as_the_better_of_routing_and_static_pruning(
    embedded, carve, held_out, tmp_path, notation
):
    def measured(folder):
        return evaluate(folder, text=held_out, dtype="float32").perplexity

    shared, active, experts = notation
    options = {"calibration": CALIBRATION, "samples": 64, "sequence_length": 256}
    budget = (shared + active) / experts
    result = convert(embedded, tmp_path / "out", experts=experts, budget=budget, **options)
    assert result.notation == f"S{shared}A{active}E{experts}"
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert report["settings"]["budget"] == budget
    for layer in report["layers"]:
        tried = {int(pinned): error for pinned, error in layer["split"].items()}
        assert tried.keys() >= {0, active}
        assert tried[layer["pinned_experts"]] == min(tried.values())
    routed = measured(carve(embedded, notation, **options))
    static = measured(carve(embedded, (shared + active, 0, experts), **options))
    # Held-out errors of single layers are a noisy guide to perplexity in a model this small.
    assert measured(tmp_path / "out") < 1.02 * min(routed, static)


@pytest.mark.parametrize("recipe", ["paper", "refined"])
def test_activations_of_many_tokens_are_made_again(dense, tmp_path, monkeypatch, recipe):
    """Windows of 60 tokens, and 100 whose activations are kept: the limit lies within a window."""
    monkeypatch.setattr(decoder, "BATCH_TOKENS", 60)
    monkeypatch.setattr(pipeline, "PROFILED_TOKENS", 100)
    options = {"calibration": CALIBRATION, "samples": 9, "sequence_length": 60, "recipe": recipe}
    convert(dense, tmp_path / "routed", shared=2, active=2, experts=8, **options)
    exact = convert(dense, tmp_path / "exact", shared=2, active=6, experts=8, **options)
    assert exact.relative_output_error < 1e-5
