# SPDX-License-Identifier: Apache-2.0
"""The refit against the least-squares problem it claims to solve, and the choice of its ridge."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

from cmoe_hf.conversion import CMoEError
from cmoe_hf.conversion.carve import refit
from cmoe_hf.conversion.carve.layer import FFN
from cmoe_hf.conversion.carve.linalg import solve_shifted
from cmoe_hf.conversion.carve.partition import Partition
from cmoe_hf.conversion.carve.refit import (
    RIDGES,
    Samples,
    reconstruct,
    sparse_output,
    token_weights,
)

TOKENS, HIDDEN, NEURONS = 600, 6, 4


def linear(down_HF, bias_H=None):
    """An FFN whose hidden activations are its inputs."""
    eye_FF = torch.eye(down_HF.shape[1])
    return FFN(None, eye_FF, down_HF, lambda x: x, torch.float32, None, bias_H)


def problem(tokens, shape, hidden, seed=0, *, keep=0.6, biased=False):
    """A carved linear FFN, its routing, inputs and random targets and weights."""
    shared, experts, neurons = shape
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator)

    width = (shared + experts) * neurons
    order_F = torch.randperm(width, generator=generator)
    shared_S, routed_R = order_F.tensor_split([shared * neurons])
    parts = Partition(shared_S, routed_R.view(experts, neurons), None, 0)
    run_TN = torch.rand(tokens, experts, generator=generator) < keep
    samples = Samples(rand(tokens, width), rand(tokens, hidden), rand(tokens).abs() + 0.5)
    ffn = linear(rand(hidden, width), rand(hidden) if biased else None)
    return ffn, parts, run_TN, samples


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


def masked(ffn, parts, run_TN, x_TH):
    """Z: activations with the zeros of idle experts, and a column of ones for a bias."""
    mask_TF = torch.zeros(len(x_TH), ffn.width)
    mask_TF[:, parts.shared_S] = 1
    for expert, ids_M in enumerate(parts.experts_NM):
        mask_TF[:, ids_M] = run_TN[:, expert, None].float()
    z_TF = ffn.hidden(x_TH) * mask_TF
    return torch.cat([z_TF, torch.ones(len(x_TH), 1)], dim=1) if ffn.is_biased else z_TF


def regression(ffn, parts, run_TN, samples, ridge):
    """The weights by ordinary least squares in float64, with the ridge as further rows."""
    weight_T1 = samples.weight_T[:, None]
    z_TG = (masked(ffn, parts, run_TN, samples.x_TH) * weight_T1).double()
    root = (ridge * z_TG.square().sum(dim=0).mean()).sqrt()
    rows = torch.cat([z_TG, root * torch.eye(z_TG.shape[1])])
    targets = torch.cat([samples.target_TH * weight_T1, root * ffn.down_with_bias.T])
    return torch.linalg.lstsq(rows, targets.double(), driver="gelsd").solution.T.float()


shapes = st.tuples(st.integers(0, 2), st.integers(1, 4), st.integers(1, 5))


@pytest.mark.parametrize("biased", [False, True])
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), shapes, st.integers(1, 6), st.integers(0, 99))
def test_it_is_the_ridge_regression_that_stays_near_the_dense_weights(
    biased, tokens, shape, hidden, seed
):
    layer = problem(tokens, shape, hidden, seed, biased=biased)
    if masked(*layer[:3], layer[3].x_TH).any():  # or there is nothing to solve
        got = reconstruct(*layer, ridge=0.1).down_HG
        torch.testing.assert_close(got, regression(*layer, 0.1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", [7, 64])
def test_batches_add_up_to_the_refit_of_all_tokens(monkeypatch, size, biased):
    layer = problem(300, (1, 4, 6), 5, biased=biased)
    whole = reconstruct(*layer, ridge=0.1)
    monkeypatch.setattr(refit, "BATCH_TOKENS", size)
    torch.testing.assert_close(
        reconstruct(*layer, ridge=0.1).down_HG, whole.down_HG, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("held_out", [0, 100])
def test_where_nothing_is_missing_nothing_changes(held_out):
    ffn, down_HG, parts, run_TN, samples = carved()
    run_TN, samples = torch.ones_like(run_TN), samples._replace(num_held_out=held_out)
    result = reconstruct(ffn, parts, run_TN, samples)
    torch.testing.assert_close(result.down_HG, down_HG, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [10, 100])
@pytest.mark.parametrize("shared", [0, 1])
def test_neurons_that_never_run_keep_their_weights(tokens, shared):
    ffn, parts, run_TN, samples = problem(tokens, (shared, 2, 4), 3)
    run_TN[:] = False
    got = reconstruct(ffn, parts, run_TN, samples, ridge=0.01).down_HG
    changed_F = (got != ffn.down_HF).any(dim=0)
    assert changed_F.nonzero().flatten().tolist() == parts.shared_S.sort().values.tolist()


@pytest.mark.parametrize("ridge", [1e-12, 1e-3])
def test_equal_neurons_are_no_trouble(ridge):
    z_TF, down_HF, target_TH = torch.randn(300, 6), torch.randn(4, 6), torch.randn(300, 4)
    twice_TF, twice_HF = z_TF.repeat(1, 3) * 1e3, down_HF.repeat(1, 3)
    parts = Partition(torch.arange(6), torch.arange(6, 18).view(3, 4), None, 0)
    run_TN, samples = torch.ones(300, 3).bool(), Samples(twice_TF, target_TH, torch.ones(300))
    got = reconstruct(linear(twice_HF), parts, run_TN, samples, ridge=ridge).down_HG
    assert torch.isfinite(got).all()
    before = (twice_TF @ twice_HF.T - target_TH).norm()
    assert (twice_TF @ got.T - target_TH).norm() < before


@pytest.mark.parametrize("tokens", [400, 1500])
def test_float32_is_precise_enough_for_outlier_neurons(tokens):
    """Real FFNs have a few neurons a thousand times as active as the others."""
    ffn, parts, run_TN, samples = problem(tokens, (2, 6, 64), 32, keep=0.5)
    x_TH = samples.x_TH * torch.logspace(-1, 3, 512)
    target_TH = x_TH @ torch.randn(512, 32) + samples.target_TH
    layer = (ffn, parts, run_TN, Samples(x_TH, target_TH, samples.weight_T))
    z_TF = masked(ffn, parts, run_TN, x_TH).double()
    exact_TH = z_TF @ regression(*layer, 0.003).double().T
    got_TH = z_TF @ reconstruct(*layer, ridge=0.003).down_HG.double().T
    assert (got_TH - exact_TH).norm() < 1e-3 * exact_TH.norm()


@pytest.mark.parametrize("biased", [False, True])
def test_held_out_tokens_choose_the_ridge_by_the_error_of_the_output(monkeypatch, biased):
    monkeypatch.setattr(refit, "BATCH_TOKENS", 70)
    ffn, parts, run_TN, samples = problem(400, (1, 4, 4), 5, biased=biased)
    given, unseen = slice(300), slice(300, None)
    result = reconstruct(ffn, parts, run_TN, samples._replace(num_held_out=100))
    x_TH, target_TH, weight_T = samples.take(unseen)[:3]
    for ridge in RIDGES:
        seen = reconstruct(ffn, parts, run_TN[given], samples.take(given), ridge=ridge)
        y_TH = masked(ffn, parts, run_TN[unseen], x_TH) @ seen.down_HG.T
        error = ((y_TH - target_TH) * weight_T[:, None]).norm()
        error /= (target_TH * weight_T[:, None]).norm()
        assert result.refit_errors[ridge] == pytest.approx(error.item(), rel=1e-3)
    assert result.ridge == min(result.refit_errors, key=result.refit_errors.get)
    # The last fit is of all tokens.
    expected = reconstruct(ffn, parts, run_TN, samples, ridge=result.ridge).down_HG
    torch.testing.assert_close(result.down_HG, expected, atol=1e-4, rtol=1e-4)


def test_a_few_noisy_tokens_want_a_strong_ridge_and_many_clean_ones_a_weak_one():
    def best(tokens, noise):
        ffn, parts, run_TN, samples = problem(tokens + 500, (1, 4, 5), 5, keep=1.0)
        target_TH = samples.x_TH @ (ffn.down_HF + 0.3 * torch.randn(5, 25)).T
        target_TH += noise * torch.randn(target_TH.shape)
        samples = Samples(samples.x_TH, target_TH, torch.ones(tokens + 500), 500)
        return reconstruct(ffn, parts, run_TN, samples).ridge

    torch.manual_seed(0)
    assert best(30, noise=5.0) > best(2000, noise=0.01)


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
def test_the_refit_beats_nothing_on_unseen_tokens(gated, biased):
    ffn, down_HG, parts, run_TN, samples = carved(gated=gated, biased=biased)
    given, rest = slice(500), slice(500, None)
    refitted = reconstruct(ffn, parts, run_TN[given], samples.take(given))

    def error(down_HG):
        y_TH = slow_output(ffn, down_HG, parts, run_TN[rest], samples.x_TH[rest])
        return (y_TH - samples.target_TH[rest]).norm()

    assert error(refitted.down_HG) < error(down_HG)


@pytest.mark.parametrize("sign", [1, -1])  # of a negative definite matrix there is no solution
def test_solving_leaves_the_matrix_as_it_was(sign):
    x_TX = torch.randn(4, 8)
    gram_XX = sign * x_TX.T @ x_TX
    before_XX = gram_XX.clone()
    if sign > 0:
        solved_XH = solve_shifted(gram_XX, torch.ones(8, 2), 0.1)
        expected_XH = torch.linalg.solve(before_XX + 0.1 * torch.eye(8), torch.ones(8, 2))
        torch.testing.assert_close(solved_XH, expected_XH, atol=1e-3, rtol=1e-3)
    else:
        with pytest.raises(CMoEError, match="positive definite"):
            solve_shifted(gram_XX, torch.ones(8, 2), 1e-12)
    assert torch.equal(gram_XX, before_XX)


def test_long_tokens_weigh_less_and_none_weighs_much_more_than_most():
    residual_TH = torch.ones(9, 4)
    residual_TH[0] *= 1000
    residual_TH[1] = 0
    weight_T = token_weights(residual_TH)
    assert weight_T.tolist() == pytest.approx([0.001, 2.0, *[1.0] * 7])
