# SPDX-License-Identifier: Apache-2.0
"""A carved MoE: routing within and across parents, parents kept whole, and what is refused."""

import json
import math
import shutil

import pytest
import torch
from families import SHORT
from hub import TOKEN
from refusal import refused
from safetensors.torch import load_file, save_file
from test_model import COMPILERS, equal_gradients, ids
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from cmoe_hf import CMoEQwen3MoeConfig, CMoEQwen3MoeForCausalLM
from cmoe_hf.conversion import (
    CMoEError,
    RequestError,
    Tuning,
    convert,
    evaluate,
    plan,
    publish,
    recover,
)
from cmoe_hf.conversion.carve.recipe import RECIPES, Recipe
from cmoe_hf.conversion.carve.refit import ridge_for
from cmoe_hf.conversion.carve.router import log_energy_router
from cmoe_hf.conversion.cli import app
from cmoe_hf.conversion.embedded import CALIBRATION, MODEL
from cmoe_hf.conversion.source.calibration import random_windows, tokenize
from cmoe_hf.modeling_cmoe import CMoEHierarchicalBlock

pytestmark = pytest.mark.library

BACKENDS = ("cmoe", "eager", "batched_mm", "grouped_mm")
ROUTINGS = {
    "representative": {"router_type": "representative"},
    "absolute": {"router_type": "representative", "router_absolute_score": True},
    "linear": {"router_type": "linear"},
    "flat": {"router_type": "linear", "flat_routing": True},
}
SHAPES = {"S1A1": (1, 1), "S0A2": (0, 2), "S1A0": (1, 0), "S1A3": (1, 3)}
FEW = {"calibration": CALIBRATION, "samples": 4, "sequence_length": 64}
SHAPE = {"shared": 2, "active": 2, "experts": 8}


def config(routing="linear", shape="S1A1", **changes):
    """Four parents of four experts of eight neurons; two parents run for a token."""
    shared, active = SHAPES[shape]
    fields = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_parents": 4,
        "num_parents_per_tok": 2,
        "num_experts": 4 * (4 - shared),
        "num_experts_per_tok": 2 * active,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8 * shared,
    }
    return CMoEQwen3MoeConfig(**{**fields, **ROUTINGS[routing], **changes})


def random_(module):
    """Random weights, u and b not zero, so that every term of the definition counts."""
    torch.manual_seed(0)
    for name, tensor in module.state_dict().items():
        if name.endswith("balance_bias"):
            tensor.normal_(std=0.1)
        elif ".mlp." in name or not name.startswith("model."):
            tensor.normal_(std=0.3)
    return module


def random_model(*arguments, **changes):
    torch.manual_seed(1)
    return random_(CMoEQwen3MoeForCausalLM(config(*arguments, **changes)).eval())


def run_expert(experts, number, x_H):
    gate_M, up_M = (experts.gate_up_proj[number] @ x_H).chunk(2)
    return experts.down_proj[number] @ (silu(gate_M) * up_M)


def slow_score(gate, number, x_H, settings):
    if settings.router_type == "linear":
        return (gate.linear_weight[number] @ x_H).item()
    score = (silu(gate.gate_weight[number] @ x_H) * (gate.up_weight[number] @ x_H)).item()
    return abs(score) if settings.router_absolute_score else score


def slow_token(block, x_H, settings):
    """One token by the definition."""
    gate, size = block.gate, settings.num_experts // settings.num_parents
    share_Q = (gate.parent_weight @ x_H).exp()
    share_Q = share_Q / share_Q.sum()
    parents = sorted(range(settings.num_parents), key=lambda parent: -share_Q[parent].item())
    parents = parents[: settings.num_parents_per_tok]
    weights = {parent: share_Q[parent].item() for parent in parents}
    if settings.norm_parent_prob:
        total = sum(weights.values())
        weights = {parent: weight / total for parent, weight in weights.items()}
    y_H = torch.zeros_like(x_H)
    if block.shared_experts is not None:
        for parent, weight in weights.items():
            y_H += weight * run_expert(block.shared_experts, parent, x_H)
    children = {parent: range(parent * size, (parent + 1) * size) for parent in parents}
    groups = [[n for own in children.values() for n in own]]
    if not settings.flat_routing:
        groups = list(children.values())
    kept = settings.kept_parents[0] if settings.kept_parents else []
    for whole in groups:
        group = [n for n in whole if n // size not in kept or not settings.flat_routing]
        score = {n: slow_score(gate, n, x_H, settings) for n in group}
        if settings.flat_routing:
            for n in group:
                score[n] += gate.linear_bias[n].item() + math.log(weights[n // size] ** 2)
        total = sum(math.exp(value) for value in score.values())
        share = {n: math.exp(value) / total for n, value in score.items()}
        order = sorted(group, key=lambda n: -(share[n] + gate.balance_bias[n].item()))
        run = set(order[: settings.num_experts_per_tok // len(groups)])
        run |= {n for n in whole if n // size in kept}
        for n in run:
            scale = 1 + share.get(n, 0) * gate.scale[n].item()
            y_H += weights[n // size] * scale * run_expert(block.experts, n, x_H)
    return y_H


@pytest.mark.parametrize("kept", [None, [[0, 3], []]], ids=["carved", "kept"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("routing", ROUTINGS)
@torch.no_grad()
def test_the_block_against_its_definition(routing, shape, kept):
    for norm_parent_prob in (False, True):
        settings = config(routing, shape, kept_parents=kept, norm_parent_prob=norm_parent_prob)
        block = random_(CMoEHierarchicalBlock(settings, 0))
        for tokens in (1, 40):
            x = torch.randn(1, tokens, 32)
            expected = torch.stack([slow_token(block, x_H, settings) for x_H in x[0]])[None]
            for backend in BACKENDS:
                settings._experts_implementation = backend
                torch.testing.assert_close(block(x), expected, atol=1e-4, rtol=1e-4, msg=backend)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_router_logits_are_the_scores_of_all_experts(routing):
    model = random_model(routing)
    assert model(ids).router_logits is None
    seen = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_pre_hook(lambda gate, inputs: seen.append(inputs[0]))
    recorded = model(ids, output_router_logits=True).router_logits
    assert len(recorded) == len(seen) == 2
    for layer, x_TH, score_TN in zip(model.model.layers, seen, recorded, strict=True):
        gate = layer.mlp.gate
        assert score_TN.shape == (24, 12)
        for x_H, score_N in zip(x_TH, score_TN, strict=True):
            expected = torch.tensor([slow_score(gate, n, x_H, model.config) for n in range(12)])
            if routing == "flat":
                expected += gate.linear_bias
            torch.testing.assert_close(score_N, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_kept_parents_compile_as_one_graph(compiler):
    model = random_model("flat", num_hidden_layers=1, kept_parents=[[0, 3]])
    with torch.no_grad():
        expected = model(ids).logits
        got = torch.compile(model, fullgraph=True, backend=compiler)(ids).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kept", [None, [[0, 3], [1]]], ids=["carved", "kept"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_gradients_agree_between_backends_and_reach_everything(routing, kept):
    for gradients in equal_gradients(lambda: random_model(routing, kept_parents=kept), BACKENDS):
        for name, gradient in gradients.items():
            assert gradient.any(), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 13}, "multiple of num_parents"),
        ({"num_experts_per_tok": 3}, "num_parents_per_tok"),
        ({"num_experts": 16}, "must equal intermediate_size"),
        ({"num_parents_per_tok": 5, "num_experts_per_tok": 5}, "between 1 and num_parents"),
        ({"router_type": "representative", "flat_routing": True}, "linear router"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(Exception, match=message):
        config(**changes)


@pytest.fixture(scope="module")
def moe(make_dense):
    """The pico MoE most tests use. Read only."""
    return make_dense("qwen3-moe")


@pytest.fixture(scope="module", params=["paper", "refined"])
def pair(request, moe, carve):
    """A carved MoE, and the recipe."""
    return carve(moe, recipe=request.param), request.param


@pytest.fixture(scope="module")
def carved_moe(moe, carve):
    """A MoE carved by the refined recipe. Read only."""
    return carve(moe)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def layers_of(folder):
    return json.loads((folder / "conversion.json").read_text())["layers"]


def calibration(folder, samples=4, length=64):
    """The windows that `convert` takes with seed 0."""
    tokens = tokenize(AutoTokenizer.from_pretrained(folder), CALIBRATION.read_text())
    return random_windows(tokens, samples=samples, length=length, seed=0)


def picked_parents(model, windows_WL):
    """The gates' inputs of each layer, and the parents that they pick, each once a token."""
    inputs = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(windows_WL)
    gates = [layer.mlp.gate for layer in model.model.layers]
    weights = [getattr(g, "parent_weight", getattr(g, "weight", None)) for g in gates]
    return [(x_TH @ weight.T).topk(2).indices for x_TH, weight in zip(inputs, weights, strict=True)]


def test_calibration_sees_the_parents_that_the_carved_model_picks(moe, pair):
    carved, _ = pair
    counts = [layer["tokens_of_parents"] for layer in layers_of(carved)]
    windows_WL = calibration(moe)
    source, ours = (
        [torch.bincount(index.flatten(), minlength=4).tolist() for index in picked]
        for picked in (picked_parents(load(folder), windows_WL) for folder in (moe, carved))
    )
    assert counts[0] == source[0]
    assert counts == ours != source


@pytest.fixture(scope="module")
def lopsided(make_dense, carve, tmp_path_factory):
    """A MoE whose first two parents see half of 96 tokens each; the other six see too few."""
    source = tmp_path_factory.mktemp("lopsided") / "source"
    shutil.copytree(make_dense("qwen3-moe", num_experts=8), source)
    weights = load_file(source / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("mlp.gate.weight"):
            tensor[:2] *= 10
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    return source, carve(source, samples=1, sequence_length=96)


def test_parents_that_see_too_little_are_kept_whole(lopsided, tensors):
    source, carved = lopsided
    kept = json.loads((carved / "config.json").read_text())["kept_parents"]
    figures = layers_of(carved)
    assert kept == [layer["kept_parents"] for layer in figures]
    card = (carved / "README.md").read_text()
    before, after = tensors(source), tensors(carved)
    for index, layer in enumerate(figures):
        seen = layer["tokens_of_parents"]
        assert sum(seen) == 2 * 96
        assert kept[index] == [parent for parent, count in enumerate(seen) if 3 * count < 96]
        assert 0 < len(kept[index]) < 8
        assert f"| {min(seen)} | {max(seen)} | {', '.join(map(str, kept[index]))} |" in card
        prefix = f"model.layers.{index}.mlp."
        for parent in range(8):
            routed = after[prefix + "experts.down_proj"].unflatten(0, (8, 6))[parent]
            shared = after[prefix + "shared_experts.down_proj"][parent]
            ours = torch.cat([shared, *routed], dim=1)
            theirs = before[f"{prefix}experts.{parent}.down_proj.weight"]
            columns = [
                {column.numpy().tobytes() for column in down_HF.T.contiguous()}
                for down_HF in (ours, theirs)
            ]
            assert (columns[0] == columns[1]) == (parent in kept[index])


@torch.no_grad()
def test_where_all_parents_are_kept_a_token_sees_the_source(lopsided):
    dense, carved = map(load, lopsided)
    x = torch.randn(1, 400, 64, generator=torch.Generator().manual_seed(0))
    for theirs, ours in zip(dense.model.layers, carved.model.layers, strict=True):
        kept = torch.tensor(sorted(ours.mlp.gate.kept_parents))
        whole_T = torch.isin(ours.mlp.gate.parents(x[0])[1], kept).all(dim=1)
        assert 10 < whole_T.sum() < 390
        wanted_TH, got_TH = theirs.mlp(x)[0], ours.mlp(x)[0]
        torch.testing.assert_close(got_TH[whole_T], wanted_TH[whole_T], atol=1e-4, rtol=1e-4)
        assert not torch.isclose(got_TH[~whole_T], wanted_TH[~whole_T], atol=1e-3).any(1).all()


@torch.no_grad()
def test_a_kept_parent_takes_no_slot_from_a_carved_one(lopsided):
    """Its experts run anyway."""
    x_TH = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    for layer in load(lopsided[1]).model.layers:
        _, _, index_TK, *_, parent_TP = layer.mlp.gate(x_TH)
        kept = torch.tensor(sorted(layer.mlp.gate.kept_parents))
        mixed_T = torch.isin(parent_TP, kept).sum(dim=1) == 1
        assert mixed_T.any()
        of_carved_TK = ~torch.isin(index_TK[mixed_T] // 6, kept)
        assert (of_carved_TK.sum(dim=1) >= 2).all()


def test_evaluate_compares_with_the_oracle_and_chance(moe, pair):
    carved, recipe = pair
    text = {"text": SHORT, "sequence_length": 64}
    own = evaluate(carved, baseline=moe, **text)
    # Six experts in each of two parents, or twelve in both together.
    choices = math.comb(6, 2) if recipe == "paper" else math.comb(12, 4)
    assert own.router_chance_agreement == pytest.approx(1 / choices)
    assert 0 <= own.router_oracle_agreement <= 1
    assert own.router_oracle_agreement > own.router_chance_agreement
    for router in ("oracle", "random"):
        other = evaluate(carved, router=router, **text)
        assert other.router_oracle_agreement is None
        assert other.perplexity != own.perplexity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 8, "budget": 0.5}, "source is a MoE"),
        ({"always_on": 1}, "source is a MoE"),
        ({"adaptive_split": True}, "source is a MoE"),
        ({"routed_by": "oracle"}, "routed_by"),
        # 160, the width of no layer, would be divisible.
        ({**SHAPE, "experts": 10}, "width 96 is not divisible by 10"),
        ({"router": "representative", "clusters": "marks"}, "linear router"),
        ({"competition": "expert"}, "competition"),
    ],
)
def test_what_a_moe_cannot_be_asked_for(moe, no_leftovers, options, message):
    if "experts" not in options:
        with pytest.raises(RequestError, match=message):
            convert(moe, no_leftovers, **FEW, **SHAPE, recipe=Recipe.of("refined", **options))
    else:
        for function in (convert, plan):
            with pytest.raises(RequestError, match=message):
                function(moe, no_leftovers, **FEW, **options)


@pytest.mark.parametrize("change", [{"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}])
def test_a_moe_with_dense_layers_is_refused(make_dense, no_leftovers, change):
    with pytest.raises(RequestError, match="every layer must have experts"):
        convert(make_dense("qwen3-moe", **change), no_leftovers, **FEW, **SHAPE)


@pytest.mark.parametrize("part", ["experts.2.up_proj", "gate"])
def test_a_missing_tensor_is_named(moe, tmp_path, no_leftovers, part):
    source, lost = shutil.copytree(moe, tmp_path / "copy"), f"model.layers.1.mlp.{part}.weight"
    weights = load_file(source / "model.safetensors")
    del weights[lost]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=lost):
        convert(source, no_leftovers, **FEW, **SHAPE)


def test_a_carved_moe_is_not_carved_again(carved_moe, no_leftovers):
    with pytest.raises(RequestError, match="carved already"):
        convert(carved_moe, no_leftovers, **FEW, **SHAPE)


@pytest.mark.parametrize("command", ["benchmark", "report", "export"])
def test_what_knows_dense_sources_only_says_so(carved_moe, no_leftovers, command):
    options = {"report": ["--text", SHORT, "--output", no_leftovers], "export": [no_leftovers]}
    arguments = [command, carved_moe, *options.get(command, [])]
    refused(CliRunner().invoke(app, [*map(str, arguments)]), 2, "carved MoE")


def test_the_ridge_grows_only_below_ten_tokens_a_neuron():
    for tokens in (960, 961, 10**6):
        assert ridge_for(tokens, 96, 0.003) == 0.003
    assert ridge_for(480, 96, 0.003) == pytest.approx(4 * 0.003)
    ridges = [ridge_for(tokens, 96, 0.003) for tokens in range(1200)]
    assert ridges == sorted(ridges, reverse=True)
    assert all(0 < ridge < math.inf for ridge in ridges)


def test_the_router_finds_log_energies_that_are_linear():
    torch.manual_seed(0)
    x_TH, weight_NH, bias_N = torch.randn(4000, 8), 0.3 * torch.randn(3, 8), torch.randn(3)
    x_TH -= x_TH.mean(dim=0)
    log_TN = x_TH @ weight_NH.T + bias_N
    found = log_energy_router(x_TH, log_TN.exp(), ridge=1e-6)
    torch.testing.assert_close(found["linear_weight"], weight_NH, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found["linear_bias"], bias_N, atol=1e-3, rtol=1e-3)
    # An expert twice as loud is offset; one that is silent at times does no harm.
    louder = log_energy_router(x_TH, 4 * log_TN.exp(), ridge=1e-6)
    torch.testing.assert_close(louder["linear_bias"], bias_N + math.log(4), atol=1e-3, rtol=1e-3)
    silent = log_energy_router(x_TH, log_TN.exp() * (torch.rand(4000, 3) < 0.5), ridge=1e-6)
    assert all(torch.isfinite(tensor).all() for tensor in silent.values())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["qwen3-moe", "olmoe"])
def test_the_plan_of_a_moe(make_dense, carve, tmp_path, tensors, family, recipe):
    source = make_dense(family)
    planned = plan(source, tmp_path / "out", **FEW, **SHAPE, recipe=recipe)
    parent = 3 * 64 * 96
    outside = sum(
        tensor.numel() for name, tensor in tensors(source).items() if ".mlp.experts." not in name
    )
    assert planned.parameters == outside + 2 * 4 * parent
    assert planned.active_parameters == outside + 2 * 2 * parent // 2
    assert (planned.layers, planned.hidden_size, planned.ffn_width) == (2, 64, 96)
    assert (planned.expert_width, planned.routed_experts) == (12, 4 * 6)
    assert (planned.notation, planned.activation_ratio) == ("S2A2E8", 0.5)
    assert planned.calibration_tokens == 256
    folder = carve(source, recipe=recipe)
    real = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert planned.disk_bytes == pytest.approx(real, rel=0.1)


TUNING = {
    "objective": "next-token",
    "samples": 8,
    "sequence_length": 64,
    "learning_rate": 3e-3,
    "router_learning_rate": 0.1,
}


@pytest.fixture(scope="module")
def recovered(moe, carved_moe, tmp_path_factory):
    """A carved MoE after four steps of tuning, and the result."""
    output, texts = tmp_path_factory.mktemp("tuned") / "out", {"training": CALIBRATION}
    tuning = Tuning(**TUNING, bias_speed=0.01)
    return output, recover(carved_moe, output, **texts, text=SHORT, tuning=tuning)


def test_recovery_trains_and_merges(carved_moe, recovered, tensors):
    output, result = recovered
    assert result.steps == 4 and result.scale > 0.01
    assert math.isfinite(result.perplexity_after)
    before, after = tensors(carved_moe), tensors(output)
    assert before.keys() == after.keys()
    learns = ("_proj.weight", "experts.gate_up_proj", "experts.down_proj", "scale", "balance_bias")
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) != name.endswith(learns), name
        assert tensor.dtype == after[name].dtype


@pytest.mark.parametrize("tuned", [False, True])
def test_it_is_fit_to_be_published(carved_moe, recovered, tmp_path, hub, monkeypatch, tuned):
    hub.reset()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = shutil.copytree(recovered[0] if tuned else carved_moe, tmp_path / "mine")
    try:
        result = publish(folder, "org/moe", licence="apache-2.0", base_model="org/dense")
        assert result.files == len([path for path in folder.rglob("*") if path.is_file()])
        assert set(hub.repositories["org/moe"].files("main")) >= {"config.json", "README.md"}
    finally:
        hub.reset()


@pytest.mark.parametrize("samples", [4, 1], ids=["carved", "kept"])
@pytest.mark.parametrize("recipe", ["paper", "refined"])
def test_an_expert_that_overflows_is_named_by_its_layer(make_dense, tmp_path, recipe, samples):
    """The weights are finite; with one short window no expert sees enough to be carved."""
    model = AutoModelForCausalLM.from_pretrained(make_dense("qwen3-moe"))
    model.model.layers[1].mlp.experts.gate_up_proj.data[2] = 1e30
    model.save_pretrained(tmp_path / "source")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "source")
    settings = {"calibration": CALIBRATION, "samples": samples, "sequence_length": 16 * samples}
    with pytest.raises(CMoEError, match="layer 1 produces NaN or infinite activations"):
        convert(tmp_path / "source", tmp_path / "carved", recipe=recipe, **settings, **SHAPE)
    assert not (tmp_path / "carved").exists()
