# SPDX-License-Identifier: Apache-2.0
"""Perplexity by the written protocol, and the router between oracle and chance."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from cmoe_hf.conversion import RequestError, evaluate
from cmoe_hf.conversion.cli import app


def slow_perplexity(folder, text, length):
    """Window by window, token by token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(text.read_text(), verbose=False)["input_ids"]
    total, count = 0.0, 0
    for start in range(0, len(ids) - length + 1, length):
        window = ids[start : start + length]
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0].double()
        for position in range(length - 1):
            share = logits[position].log_softmax(dim=0)
            total -= share[window[position + 1]].item()
            count += 1
    return math.exp(total / count), count


def test_perplexity_is_what_the_protocol_says(embedded, carve, short_text):
    carved = carve(embedded, (3, 3, 8))
    result = evaluate(
        carved, baseline=embedded, text=short_text, sequence_length=50, dtype="float32"
    )
    expected, tokens = slow_perplexity(carved, short_text, 50)
    assert result.perplexity == pytest.approx(expected, rel=1e-4)
    assert result.tokens == tokens
    dense, _ = slow_perplexity(embedded, short_text, 50)
    assert result.baseline_perplexity == pytest.approx(dense, rel=1e-4)


def test_all_active_measures_the_same_as_dense(embedded, carve, short_text):
    result = evaluate(
        carve(embedded, (3, 5, 8)), baseline=embedded, text=short_text, dtype="float32"
    )
    assert result.perplexity == pytest.approx(result.baseline_perplexity, rel=1e-5)
    assert result.router_oracle_agreement == result.router_chance_agreement == 1


@pytest.fixture(scope="module")
def sparse(embedded, carve):
    """One of eight experts shared, one active, by the paper: the router matters."""
    return carve(embedded, (1, 1, 8), recipe="paper", samples=16, sequence_length=256)


def test_the_oracle_router_is_better_than_the_own_one_and_chance(sparse, held_out):
    own, oracle, chance = (
        evaluate(sparse, text=held_out, router=router) for router in ("own", "oracle", "random")
    )
    assert oracle.perplexity < own.perplexity
    assert oracle.perplexity < chance.perplexity
    assert own.router_chance_agreement == pytest.approx(1 / 7)
    assert oracle.router_oracle_agreement is chance.router_oracle_agreement is None
    # As published: the paper's router is close to chance.
    assert 0.5 / 7 < own.router_oracle_agreement < 2.5 / 7


def test_the_random_router_is_reproducible(sparse, short_text):
    first, second, other = (
        evaluate(sparse, text=short_text, router="random", seed=seed).perplexity
        for seed in (0, 0, 1)
    )
    assert first == second != other


def test_a_dense_or_static_model_has_no_router_figures(embedded, carve, short_text):
    for model in (embedded, carve(embedded, (6, 0, 8))):
        result = evaluate(model, text=short_text)
        assert result.router_oracle_agreement is None
        assert result.router_chance_agreement is None
        with pytest.raises(RequestError, match="does not route"):
            evaluate(model, text=short_text, router="oracle")


def test_bad_requests(embedded, dense_copy, short_text):
    with pytest.raises(RequestError, match="fewer than one window of 5000"):
        evaluate(embedded, text=short_text, sequence_length=5000)
    with pytest.raises(RequestError, match="at least 2"):
        evaluate(embedded, text=short_text, sequence_length=1)
    with pytest.raises(RequestError, match="own, oracle, random"):
        evaluate(embedded, text=short_text, router="magic")
    tokenizer = AutoTokenizer.from_pretrained(dense_copy)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(dense_copy)
    with pytest.raises(RequestError, match="another vocabulary"):
        evaluate(embedded, baseline=dense_copy, text=short_text)


def test_json_is_one_object_with_the_promised_keys(sparse, embedded, short_text):
    arguments = ["evaluate", str(sparse), "--baseline", str(embedded)]
    result = CliRunner().invoke(app, [*arguments, "--text", str(short_text), "--json"])
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert {
        "perplexity",
        "tokens",
        "baseline_perplexity",
        "router_oracle_agreement",
        "router_chance_agreement",
    } <= printed.keys()
    result = evaluate(sparse, baseline=embedded, text=short_text)
    assert printed["perplexity"] == result.perplexity
    assert printed["baseline_perplexity"] == result.baseline_perplexity < result.perplexity
