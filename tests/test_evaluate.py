# SPDX-License-Identifier: Apache-2.0
"""Perplexity by the written protocol, and the router between oracle and chance."""

import json
import math
from functools import partial

import pytest
import torch
from families import SHORT
from refusal import refused
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from cmoe_hf.conversion import RequestError, Tuning, benchmark, evaluate, recover
from cmoe_hf.conversion.cli import app
from cmoe_hf.conversion.embedded import CALIBRATION


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
    carved, options = carve(embedded, (3, 3, 8)), ["--sequence-length", "50", "--dtype", "float32"]
    arguments = ["evaluate", carved, "--baseline", embedded, "--text", short_text, *options]
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    expected, tokens = slow_perplexity(carved, short_text, 50)
    assert printed["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert (printed["tokens"], printed["sequence_length"]) == (tokens, 50)
    dense, _ = slow_perplexity(embedded, short_text, 50)
    assert printed["baseline_perplexity"] == pytest.approx(dense, rel=1e-4)
    assert printed["router_chance_agreement"] == pytest.approx(1 / 10)
    assert 0 <= printed["router_oracle_agreement"] <= 1 and printed["router"] == "own"


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


def test_the_oracle_router_is_better_than_the_own_one_and_chance(sparse, held_out, short_text):
    own, oracle, chance = (
        evaluate(sparse, text=held_out, router=router) for router in ("own", "oracle", "random")
    )
    assert oracle.perplexity < own.perplexity
    assert oracle.perplexity < chance.perplexity
    assert own.router_chance_agreement == pytest.approx(1 / 7)
    assert oracle.router_oracle_agreement is chance.router_oracle_agreement is None
    # As published: the paper's router is close to chance.
    assert 0.5 / 7 < own.router_oracle_agreement < 2.5 / 7
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


def test_bad_requests(embedded, dense_copy, short_text, tmp_path):
    (tmp_path / "short.txt").write_text("Two words.")
    with pytest.raises(RequestError, match="fewer than one window of 250"):
        evaluate(embedded, text=tmp_path / "short.txt", sequence_length=250)
    with pytest.raises(RequestError, match="at least 2"):
        evaluate(embedded, text=short_text, sequence_length=1)
    with pytest.raises(RequestError, match="own, oracle, random"):
        evaluate(embedded, text=short_text, router="magic")
    tokenizer = AutoTokenizer.from_pretrained(dense_copy)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(dense_copy)
    with pytest.raises(RequestError, match="another vocabulary"):
        evaluate(embedded, baseline=dense_copy, text=short_text)


def test_divergence_and_agreement_are_what_a_loop_finds(dense, carve, short_text):
    carved = carve(dense)
    found = evaluate(carved, baseline=dense, text=short_text, sequence_length=50, windows=3)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    ids = tokenizer(short_text.read_text(), return_tensors="pt")["input_ids"][0]
    models = [AutoModelForCausalLM.from_pretrained(it) for it in (carved, dense)]
    total, same = 0.0, 0
    for start in (0, 50, 100):
        window = ids[None, start : start + 50]
        ours, theirs = (model(window).logits[0].detach().softmax(1) for model in models)
        for q, p in zip(ours[:-1], theirs[:-1], strict=True):
            total += float((p * (p / q).log()).sum())
            same += int(p.argmax() == q.argmax())
    assert found.divergence == pytest.approx(total / 147, rel=1e-3)
    assert found.agreement == pytest.approx(same / 147)
    alone = evaluate(carved, text=short_text, sequence_length=50, windows=3)
    assert alone.divergence is None and alone.agreement is None
    assert alone.perplexity == found.perplexity


PAPER = ["--objective", "next-token"]
CONTEXT = {
    "convert": ["{dense}", "{out}", "--calibration", CALIBRATION, "--budget", 0.5],
    "evaluate": ["{carved}", "--text", SHORT],
    "report": ["{carved}", "--text", SHORT, "--output", "{out}"],
    "recover": ["{carved}", "{out}", "--training", CALIBRATION, "--text", SHORT, *PAPER],
    "sweep": ["{dense}", "{out}", "--calibration", CALIBRATION, "--text", SHORT],
}


@pytest.mark.parametrize("command", CONTEXT)
def test_windows_longer_than_the_context_are_refused(dense, carve, tmp_path, command):
    places = {"dense": dense, "carved": carve(dense), "out": tmp_path / "out"}
    arguments = [str(it).format(**places) for it in CONTEXT[command]]
    result = CliRunner().invoke(app, [command, *arguments, "--sequence-length", "129"])
    refused(result, 2, "--sequence-length 129 is longer than the model's context of 128 tokens")
    assert not (tmp_path / "out").exists()


def test_the_shortest_context_of_several_models_counts(dense, make_dense, carve, tmp_path):
    shorter, carved = make_dense(max_position_embeddings=64), carve(dense)
    tuning = Tuning(sequence_length=65)
    recovery = {"training": CALIBRATION, "text": SHORT, "tuning": tuning}
    for call in (
        partial(evaluate, carved, baseline=shorter, text=SHORT, sequence_length=65),
        partial(recover, carved, tmp_path / "out", teacher=shorter, **recovery),
    ):
        with pytest.raises(RequestError, match="context of 64 tokens"):
            call()
    assert evaluate(carved, baseline=shorter, text=SHORT).sequence_length == 64


def test_a_benchmark_stays_within_the_context(dense, carve):
    carved, few = carve(dense), {"tokens": (), "rounds": 1}
    for sizes, message in (
        (
            {"prefill": [129], "batch": ()},
            "--prefill 129 is longer than the model's context of 128",
        ),
        ({"prefill": (), "context": 121}, "--context 121 with 8 new tokens is longer"),
    ):
        with pytest.raises(RequestError, match=message):
            benchmark(carved, **sizes, **few)
    usual = benchmark(carved, batch=(1,), **few)
    assert usual.prefill[0].tokens == 128 and usual.context == 120
