# SPDX-License-Identifier: Apache-2.0
"""Polish: what it trains, what it must leave alone, and that it repeats itself byte for byte."""

import pytest
import torch
from torch.nn.functional import silu

from cmoe_hf.conversion.carve.layer import FFN
from cmoe_hf.conversion.carve.partition import Partition
from cmoe_hf.conversion.carve.polish import Schedule, Trained, polish, rate_at

TOKENS, HIDDEN, NEURONS = 600, 6, 4


def carved(*, gated=True, biased=False, shared=4, experts=4, keep=0.5, seed=0):
    """A dense FFN, its down projection with bias, a partition, a routing, inputs and outputs."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator)

    width = shared + experts * NEURONS
    ffn = FFN(
        gate_FH=rand(width, HIDDEN) if gated else None,
        up_FH=rand(width, HIDDEN),
        down_HF=rand(HIDDEN, width),
        act=silu,
        stored_dtype=torch.float32,
        up_bias_F=None if gated else rand(width),
        down_bias_H=rand(HIDDEN) if biased else None,
    )
    order_F = torch.randperm(width, generator=generator)
    parts = Partition(order_F[:shared], order_F[shared:].view(experts, NEURONS), None, 0)
    run_TN = torch.rand(TOKENS, experts, generator=generator) < keep
    run_TN[:, -1] = False
    x_TH = rand(TOKENS, HIDDEN)
    return ffn, ffn.down_with_bias, parts, run_TN, x_TH, ffn.output(ffn.hidden(x_TH))


def slow_output(ffn, down_HG, parts, run_TN, x_TH):
    """Token by token, expert by expert."""
    y_TH = torch.zeros(len(x_TH), HIDDEN)
    for token, x_H in enumerate(x_TH):
        ids = [
            parts.shared_S,
            *(m for m, on in zip(parts.experts_NM, run_TN[token], strict=True) if on),
        ]
        for ids_M in ids:
            up_M = ffn.up_FH[ids_M] @ x_H
            if ffn.up_bias_F is not None:
                up_M = up_M + ffn.up_bias_F[ids_M]
            h_M = silu(up_M) if ffn.gate_FH is None else silu(ffn.gate_FH[ids_M] @ x_H) * up_M
            y_TH[token] += down_HG[:, ids_M] @ h_M
        if ffn.is_biased:
            y_TH[token] += down_HG[:, -1]
    return y_TH


@pytest.mark.parametrize("shared", [0, 4])
@pytest.mark.parametrize(("gated", "biased"), [(True, False), (False, True), (True, True)])
def test_its_forward_is_that_of_the_sparse_ffn(gated, biased, shared):
    ffn, down_HG, parts, run_TN, x_TH, _ = carved(gated=gated, biased=biased, shared=shared)
    trained = Trained(ffn, down_HG, parts, run_TN)
    got = trained.output(x_TH[:50], run_TN[:50])
    expected = slow_output(ffn, down_HG, parts, run_TN[:50], x_TH[:50])
    torch.testing.assert_close(got.detach(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("gated", "biased"), [(True, False), (False, True)])
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_it_lowers_the_error_on_tokens_it_has_not_seen(gated, biased, keep):
    ffn, down_HG, parts, run_TN, x_TH, wanted_TH = carved(gated=gated, biased=biased, keep=keep)
    result = polish(
        ffn, down_HG, parts, run_TN, x_TH, wanted_TH, held=100,
        schedule=Schedule(epochs=10, batch=50, rate=0.02),
    )  # fmt: skip
    assert min(result.errors) < 0.9 * result.errors[0]
    better = FFN(
        result.gate_FH, result.up_FH, ffn.down_HF, silu, torch.float32,
        ffn.up_bias_F, ffn.down_bias_H,
    )  # fmt: skip
    held = slice(TOKENS - 100, None)
    y_TH = slow_output(better, result.down_HG, parts, run_TN[held], x_TH[held])
    error = (y_TH - wanted_TH[held]).norm() / wanted_TH[held].norm()
    assert error.item() == pytest.approx(min(result.errors), rel=1e-3)


def test_experts_that_never_run_keep_their_weights():
    ffn, down_HG, parts, run_TN, x_TH, wanted_TH = carved()
    result = polish(ffn, down_HG, parts, run_TN, x_TH, wanted_TH, held=100)
    idle_M = parts.experts_NM[-1]
    assert torch.equal(result.up_FH[idle_M], ffn.up_FH[idle_M])
    assert torch.equal(result.gate_FH[idle_M], ffn.gate_FH[idle_M])
    assert torch.equal(result.down_HG[:, idle_M], down_HG[:, idle_M])
    assert not torch.equal(result.up_FH, ffn.up_FH)


def test_it_changes_nothing_that_it_was_given():
    ffn, down_HG, parts, run_TN, x_TH, wanted_TH = carved()
    before = [t.clone() for t in (ffn.gate_FH, ffn.up_FH, down_HG, x_TH, wanted_TH)]
    polish(ffn, down_HG, parts, run_TN, x_TH, wanted_TH, held=100)
    for old, new in zip(before, (ffn.gate_FH, ffn.up_FH, down_HG, x_TH, wanted_TH), strict=True):
        assert torch.equal(old, new)


def test_the_same_input_gives_the_same_bytes():
    first, second = (polish(*carved(), held=100, schedule=Schedule(epochs=3)) for _ in range(2))
    assert torch.equal(first.up_FH, second.up_FH)
    assert torch.equal(first.down_HG, second.down_HG)
    assert first.errors == second.errors


def test_where_nothing_is_missing_it_stops_and_keeps_the_weights():
    ffn, down_HG, parts, _, x_TH, wanted_TH = carved()
    run_TN = torch.ones(TOKENS, 4, dtype=torch.bool)
    result = polish(
        ffn, down_HG, parts, run_TN, x_TH, wanted_TH, held=100, schedule=Schedule(epochs=9)
    )
    assert torch.equal(result.down_HG, down_HG)
    assert len(result.errors) == 2  # before, and one epoch of patience


def test_a_token_of_no_weight_is_not_learnt():
    ffn, down_HG, parts, run_TN, x_TH, wanted_TH = carved()
    weight_T = torch.ones(TOKENS)
    weight_T[:50] = 0
    spoilt_TH = wanted_TH.clone()
    spoilt_TH[:50] = 1e4
    clean, spoilt = (
        polish(ffn, down_HG, parts, run_TN, x_TH, y_TH, held=100, weight_T=weight_T)
        for y_TH in (wanted_TH, spoilt_TH)
    )
    assert torch.equal(clean.down_HG, spoilt.down_HG)


def test_the_rate_rises_and_falls_to_zero():
    schedule = Schedule(rate=1.0, warm_up=0.1)
    rates = [rate_at(step, 100, schedule) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == 1.0 and rates.index(1.0) in (9, 10)
    assert rates[-1] < 0.001
    assert rates[20:] == sorted(rates[20:], reverse=True)
