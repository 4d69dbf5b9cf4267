# SPDX-License-Identifier: Apache-2.0
"""What is observed inside a model is what a slow loop over tokens and neurons finds."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cmoe_hf.conversion import CMoEError
from cmoe_hf.conversion.measure.routing import imbalance, sparse_blocks
from cmoe_hf.conversion.show import observe as observing
from cmoe_hf.conversion.show.observe import observe, observe_sample, token_texts

MARKED = 10


def load(folder, *, biased=False):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chance = torch.Generator().manual_seed(2)
    for block in sparse_blocks(model) if biased else []:
        size = len(block.gate.balance_bias)
        block.gate.balance_bias.copy_(torch.rand(size, generator=chance) - 0.5)
        block.gate.balance_bias[0] = 2.0  # always runs
        block.gate.scale.data = torch.rand(size, generator=chance)
    return model


@pytest.fixture(scope="module")
def windows():
    return torch.randint(2, 1024, (3, 16), generator=torch.Generator().manual_seed(3))


def inputs_of(model, windows):
    """What enters each sparse block, token by token."""
    seen = [[] for _ in sparse_blocks(model)]
    handles = [
        block.register_forward_pre_hook(lambda _, x, kept=kept: kept.extend(x[0][0]))
        for block, kept in zip(sparse_blocks(model), seen, strict=True)
    ]
    with torch.no_grad():
        for window in windows:
            model(window[None])
    for handle in handles:
        handle.remove()
    return seen


def neurons_of(block):
    """Gate row, up row and owner of every neuron: -1 for the shared expert."""
    rows = []
    if block.shared_expert is not None:
        shared = block.shared_expert
        pairs = zip(shared.gate_proj.weight, shared.up_proj.weight, strict=True)
        rows += [(gate, up, -1) for gate, up in pairs]
    for expert, weight in enumerate(block.experts.gate_up_proj):
        half = len(weight) // 2
        rows += [(weight[i], weight[half + i], expert) for i in range(half)]
    return rows


def slow_layer(block, tokens):
    """Every figure, one token and one neuron at a time."""
    gate, neurons = block.gate, neurons_of(block)
    owners = [owner for _, _, owner in neurons]
    experts = len(gate.balance_bias)
    found = {
        "values": [],
        "marks": [0] * len(neurons),
        "mass": {"shared": 0.0, "ran": 0.0, "idle": 0.0},
        "runs": [0] * experts,
        "runs_unbiased": [0] * experts,
        "agreed": 0,
        "routes": [],
    }
    for x in tokens:
        silu = torch.nn.functional.silu
        h = [(silu(g @ x) * (u @ x)).item() for g, u, _ in neurons]
        found["values"] += list(zip(h, owners, strict=True))
        for i in sorted(range(len(h)), key=lambda i: -abs(h[i]))[:MARKED]:
            found["marks"][i] += 1
        held = [
            sum(abs(v) for v, o in zip(h, owners, strict=True) if o == e) for e in range(experts)
        ]
        score = gate.score(x[None])[0].tolist()
        p = [math.exp(s) / sum(map(math.exp, score)) for s in score]
        bias = gate.balance_bias.tolist()
        pins = [b if b > 1 else 0 for b in bias]

        def best(merit, k=gate.top_k):
            return sorted(range(experts), key=lambda expert: -merit[expert])[:k]

        chosen = best([a + b for a, b in zip(p, bias, strict=True)])
        for e in chosen:
            found["runs"][e] += 1
        for e in best([a + b for a, b in zip(p, pins, strict=True)]):
            found["runs_unbiased"][e] += 1
        found["agreed"] += set(chosen) == set(best(held))
        found["mass"]["shared"] += sum(abs(v) for v, o in zip(h, owners, strict=True) if o == -1)
        for e in range(experts):
            found["mass"]["ran" if e in chosen else "idle"] += held[e]
        order = sorted(chosen, key=lambda e: (bias[e] > 1, -p[e] - bias[e]))
        weights = [1 + p[e] * gate.scale[e].item() for e in order]
        found["routes"].append((order, [p[e] for e in order], weights))
    return found


def check_histograms(layer, found, shared, tokens):
    rates, hidden = layer["activation_rates"], layer["hidden_values"]
    for who, marks in (("shared", found["marks"][:shared]), ("routed", found["marks"][shared:])):
        assert sum(rates[who]) + rates[f"outside_{who}"] == len(marks)
        assert rates[f"outside_{who}"] == marks.count(0)
        for count, low, high in zip(
            rates[who], rates["edges"][:-1], rates["edges"][1:], strict=True
        ):
            last = high == rates["edges"][-1]
            inside = [m for m in marks if low * tokens <= m + 1e-6 and m + 1e-6 < high * tokens]
            assert count == len(inside) + (marks.count(tokens) if last else 0)
        mine = [v for v, owner in found["values"] if (owner == -1) == (who == "shared")]
        outside = [v for v in mine if not hidden["edges"][0] <= v < hidden["edges"][-1]]
        assert hidden[f"outside_{who}"] == len(outside)
        expected = torch.histogram(torch.tensor(mine), torch.tensor(hidden["edges"])).hist
        got = torch.tensor(hidden[who], dtype=torch.float32)
        assert got.sum() == len(mine) - len(outside)
        # The edges are rounded: a value on one may fall to either side.
        assert (got - expected).abs().sum() <= 4


SHAPES = [(2, 2, 8), (0, 3, 8), (7, 1, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "S{}A{}E{}".format(*shape))
@pytest.mark.parametrize("biased", [False, True])
def test_every_figure_is_that_of_a_slow_loop(dense, carve, windows, shape, biased):
    model = load(carve(dense, shape), biased=biased)
    observation = observe(model, windows)
    assert observation.tokens == windows.numel() and observation.marked == MARKED
    inputs = inputs_of(model, windows)
    for layer, block, tokens in zip(observation.layers, sparse_blocks(model), inputs, strict=True):
        found, count = slow_layer(block, tokens), len(tokens)
        check_histograms(layer, found, 12 * shape[0], count)
        whole = sum(found["mass"].values())
        for name, mass in found["mass"].items():
            assert layer["mass"][name] == pytest.approx(mass / whole, abs=1e-5)
        assert layer["loads"] == pytest.approx([runs / count for runs in found["runs"]])
        unbiased = [runs / count for runs in found["runs_unbiased"]]
        assert layer["loads_unbiased"] == pytest.approx(unbiased)
        always = block.gate.balance_bias > 1
        assert layer["imbalance"] == imbalance(torch.tensor(found["runs"]), always)
        unbiased = imbalance(torch.tensor(found["runs_unbiased"]), always)
        assert layer["imbalance_unbiased"] == unbiased
        assert layer["oracle_agreement"] == pytest.approx(found["agreed"] / count)
        assert layer["pinned"] == ([0] if biased else [])
        values = [value for value, _ in found["values"]]
        assert layer["hidden_low"] == pytest.approx(min(values), rel=1e-4)
        assert layer["hidden_high"] == pytest.approx(max(values), rel=1e-4)


def test_a_static_model_has_no_figures_of_routing(dense, carve, windows):
    model = load(carve(dense, (4, 0, 8)))
    for layer in observe(model, windows).layers:
        assert layer["loads"] == layer["loads_unbiased"] == layer["pinned"] == []
        for figure in ("imbalance", "imbalance_unbiased", "oracle_agreement"):
            assert layer[figure] is None
        assert layer["mass"]["ran"] == 0 and sum(layer["mass"].values()) == pytest.approx(1)
        assert sum(layer["hidden_values"]["shared"]) > 0
    assert observe_sample(model, windows[0]) == []


def test_tokens_are_taken_in_chunks_and_nothing_stays_attached(carved, windows, monkeypatch):
    model = load(carved)
    whole = observe(model, windows)
    monkeypatch.setattr(observing, "CHUNK_VALUES", 7 * 96)
    pieces = observe(model, windows)
    assert pieces.quality == whole.quality
    for ours, theirs in zip(pieces.layers, whole.layers, strict=True):
        for name in ("activation_rates", "loads"):
            assert ours[name] == theirs[name]
        for name in ("mass", "oracle_agreement"):
            assert ours[name] == pytest.approx(theirs[name])
    observe_sample(model, windows[0])
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_activations_that_are_not_finite(carved, windows):
    model = load(carved)
    block = sparse_blocks(model)[1]
    block.experts.gate_up_proj.data.fill_(1e30)  # finite weights whose product overflows
    with pytest.raises(CMoEError, match=r"NaN or infinite activations.*--dtype float32"):
        observe(model, windows)


@pytest.mark.parametrize("biased", [False, True])
def test_a_sample_is_followed_token_by_token(carved, windows, biased):
    model = load(carved, biased=biased)
    layers = observe_sample(model, windows[0])
    inputs = inputs_of(model, windows[:1])
    for layer, block, tokens in zip(layers, sparse_blocks(model), inputs, strict=True):
        for index, (experts, p, weights) in enumerate(slow_layer(block, tokens)["routes"]):
            assert layer["experts"][index] == experts
            assert layer["probabilities"][index] == pytest.approx(p, rel=1e-4)
            assert layer["weights"][index] == pytest.approx(weights, rel=1e-4)
            assert not biased or experts[-1] == 0  # what always runs says nothing


def test_the_texts_of_tokens_add_up(embedded):
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    text = "Two  spaces,\na line, “où?” 漢字 and 🎉."
    ids = torch.tensor(tokenizer(text)["input_ids"])
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)
    assert text in "".join(texts)
    assert "" in texts and "🎉" in texts  # parts of a character, and the last of them
