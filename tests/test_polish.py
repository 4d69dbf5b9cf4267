# SPDX-License-Identifier: Apache-2.0
"""Polish: what it trains, what it must leave alone, and that it repeats itself byte for byte."""

import pytest
import torch
from torch.nn.functional import silu

from cmoe_hf.conversion.carve.layer import FFN
from cmoe_hf.conversion.carve.partition import Partition
from cmoe_hf.conversion.carve.polish import Schedule, polish
from cmoe_hf.conversion.carve.refit import Samples, sparse_output

TOKENS, HIDDEN, NEURONS = 600, 6, 4


def carved(*, gated=True, biased=False, shared=4, experts=4, keep=0.5, seed=0):
    """A dense FFN, its down projection with bias, a partition, a routing and samples."""
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
    samples = Samples(x_TH, ffn.output(ffn.hidden(x_TH)), torch.ones(TOKENS), num_held_out=100)
    return ffn, ffn.down_with_bias, parts, run_TN, samples


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
def test_the_sparse_output_is_that_of_the_running_neurons(gated, biased, shared):
    ffn, down_HG, parts, run_TN, samples = carved(gated=gated, biased=biased, shared=shared)
    x_TH, run_TN = samples.x_TH[:50], run_TN[:50]
    expected = slow_output(ffn, down_HG, parts, run_TN, x_TH)
    for h_TF in (None, ffn.hidden(x_TH)):
        got = sparse_output(ffn, down_HG, parts, run_TN, x_TH, h_TF)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("gated", "biased"), [(True, False), (False, True)])
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_it_lowers_the_error_on_tokens_it_has_not_seen(gated, biased, keep):
    ffn, down_HG, parts, run_TN, samples = carved(gated=gated, biased=biased, keep=keep)
    schedule = Schedule(epochs=10, batch=50, rate=0.02)
    result = polish(ffn, down_HG, parts, run_TN, samples, schedule=schedule)
    assert min(result.errors) < 0.9 * result.errors[0]
    x_TH, target_TH = samples.x_TH[-100:], samples.target_TH[-100:]
    y_TH = slow_output(result.ffn, result.down_HG, parts, run_TN[-100:], x_TH)
    error = (y_TH - target_TH).norm() / target_TH.norm()
    assert error.item() == pytest.approx(min(result.errors), rel=1e-3)


def test_it_repeats_itself_and_changes_only_copies_of_what_runs():
    given = carved()
    ffn, down_HG, parts, _, samples = given
    first, second = (polish(*given, schedule=Schedule(epochs=3)) for _ in range(2))
    assert first.errors == second.errors
    for name in ("gate_FH", "up_FH"):
        assert torch.equal(getattr(first.ffn, name), getattr(second.ffn, name))
    assert torch.equal(first.down_HG, second.down_HG)
    ffn_again, down_again, _, _, samples_again = carved()
    assert torch.equal(ffn.gate_FH, ffn_again.gate_FH) and torch.equal(ffn.up_FH, ffn_again.up_FH)
    assert torch.equal(down_HG, down_again)
    assert torch.equal(samples.target_TH, samples_again.target_TH)
    idle_M = parts.experts_NM[-1]
    assert torch.equal(first.ffn.up_FH[idle_M], ffn.up_FH[idle_M])
    assert torch.equal(first.ffn.gate_FH[idle_M], ffn.gate_FH[idle_M])
    assert torch.equal(first.down_HG[:, idle_M], down_HG[:, idle_M])
    assert not torch.equal(first.ffn.up_FH, ffn.up_FH)


def test_where_nothing_is_missing_it_stops_and_keeps_the_weights():
    ffn, down_HG, parts, run_TN, samples = carved()
    run_TN = torch.ones_like(run_TN)
    result = polish(ffn, down_HG, parts, run_TN, samples, schedule=Schedule(epochs=9))
    assert torch.equal(result.down_HG, down_HG)
    assert len(result.errors) == 2  # before, and one epoch of patience


def test_a_token_of_no_weight_is_not_learnt():
    *layer, samples = carved()
    samples.weight_T[:50] = 0
    spoilt_TH = samples.target_TH.clone()
    spoilt_TH[:50] = 1e4
    clean, spoilt = (
        polish(*layer, samples._replace(target_TH=y_TH)) for y_TH in (samples.target_TH, spoilt_TH)
    )
    assert torch.equal(clean.down_HG, spoilt.down_HG)


def test_the_rate_rises_and_falls_to_zero():
    schedule = Schedule(rate=1.0, warm_up=0.1)
    rates = [schedule.rate_at(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == 1.0 and rates.index(1.0) in (9, 10)
    assert rates[-1] < 0.001
    assert rates[20:] == sorted(rates[20:], reverse=True)
