# SPDX-License-Identifier: Apache-2.0
"""The refit against the least-squares problem it claims to solve."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmoe_hf.conversion import CMoEError
from cmoe_hf.conversion.carve.linalg import solve_shifted
from cmoe_hf.conversion.carve.partition import Partition
from cmoe_hf.conversion.carve.refit import (
    Batch,
    NormalEquations,
    Running,
    held_out_errors,
    refit_down,
    refitted,
    token_weights,
)


def problem(tokens, shape, hidden, seed, keep=0.6):
    """Make a routed layer, its activations with the zeros of idle experts, and a target."""
    shared, experts, neurons = shape
    generator = torch.Generator().manual_seed(seed)
    width = (shared + experts) * neurons
    h_TF = torch.randn(tokens, width, generator=generator)
    order_F = torch.randperm(width, generator=generator)
    shared_S, routed_R = order_F[: shared * neurons], order_F[shared * neurons :]
    parts = Partition(shared_S, routed_R.view(experts, neurons), None, 0)
    run_TN = torch.rand(tokens, experts, generator=generator) < keep
    mask_TF = torch.zeros(tokens, width)
    mask_TF[:, shared_S] = 1
    for expert, ids_M in enumerate(parts.experts_NM):
        mask_TF[:, ids_M] = run_TN[:, expert, None].float()
    down_HF = torch.randn(hidden, width, generator=generator)
    wanted_TH = torch.randn(tokens, hidden, generator=generator)
    return (h_TF, parts, run_TN), h_TF * mask_TF, down_HF, wanted_TH


shapes = st.tuples(st.integers(0, 2), st.integers(1, 4), st.integers(1, 5))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), shapes, st.integers(1, 6), st.integers(0, 99))
def test_it_is_the_ridge_regression_that_stays_near_the_dense_weights(tokens, shape, hidden, seed):
    layer, z_TF, down_HF, wanted_TH = problem(tokens, shape, hidden, seed)
    width = z_TF.shape[1]
    ridge = 0.1 * z_TF.square().sum(dim=0).mean().item()
    # Ordinary least squares with the ridge as further rows.
    rows = torch.cat([z_TF, ridge**0.5 * torch.eye(width)]).double()
    wanted = torch.cat([wanted_TH, ridge**0.5 * down_HF.T]).double()
    expected = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T.float()
    if ridge == 0:
        expected = down_HF
    got = refit_down(*layer, wanted_TH, down_HF, ridge=0.1)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("tokens", [15, 200])
def test_where_nothing_is_missing_nothing_changes(tokens):
    layer, z_TF, down_HF, _ = problem(tokens, (1, 3, 4), 5, 0, keep=1.0)
    got = refit_down(*layer, z_TF @ down_HF.T, down_HF, ridge=0.003)
    torch.testing.assert_close(got, down_HF, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [10, 100])
def test_experts_that_never_run_keep_their_weights(tokens):
    h_TF, down_HF = torch.randn(tokens, 12), torch.randn(4, 12)
    parts = Partition(torch.arange(4), torch.arange(4, 12).view(2, 4), None, 0)
    run_TN = torch.tensor([[True, False]]).expand(tokens, 2)
    got = refit_down(h_TF, parts, run_TN, torch.randn(tokens, 4), down_HF, ridge=0.01)
    assert torch.equal(got[:, 8:], down_HF[:, 8:])
    assert not torch.isclose(got[:, :8], down_HF[:, :8]).any()


def test_nothing_running_at_all_changes_nothing():
    parts = Partition(torch.arange(0), torch.arange(8).view(2, 4), None, 0)
    layer = (torch.randn(10, 8), parts, torch.zeros(10, 2, dtype=torch.bool))
    down_HF = torch.randn(3, 8)
    assert torch.equal(refit_down(*layer, torch.randn(10, 3), down_HF, ridge=0.01), down_HF)


@pytest.mark.parametrize("ridge", [1e-12, 1e-3])
def test_equal_neurons_are_no_trouble(ridge):
    z_TF, down_HF, wanted_TH = torch.randn(300, 6), torch.randn(4, 6), torch.randn(300, 4)
    twice_TF, twice_HF = z_TF.repeat(1, 3) * 1e3, down_HF.repeat(1, 3)
    parts = Partition(torch.arange(6), torch.arange(6, 18).view(3, 4), None, 0)
    run_TN = torch.ones(300, 3, dtype=torch.bool)
    got = refit_down(twice_TF, parts, run_TN, wanted_TH, twice_HF, ridge=ridge)
    assert torch.isfinite(got).all()
    before = (twice_TF @ twice_HF.T - wanted_TH).norm()
    assert (twice_TF @ got.T - wanted_TH).norm() < before


@pytest.mark.parametrize("tokens", [400, 1500])
def test_float32_is_precise_enough_for_outlier_neurons(tokens):
    """Real FFNs have a few neurons a thousand times as active as the others."""
    torch.manual_seed(0)
    h_TF = torch.randn(tokens, 512) * torch.logspace(-1, 3, 512)
    parts = Partition(torch.arange(128), torch.arange(128, 512).view(6, 64), None, 0)
    run_TN = torch.rand(tokens, 6) < 0.5
    wanted_TH, down_HF = h_TF @ torch.randn(512, 32) + torch.randn(tokens, 32), torch.randn(32, 512)
    down_HF, h_TF, target_TH = down_HF.double(), h_TF.double(), wanted_TH.double()
    z_TF = h_TF * torch.cat([torch.ones(tokens, 128), run_TN.repeat_interleave(64, 1)], dim=1)
    ridge = 0.003 * z_TF.square().sum(dim=0).mean()
    rows = torch.cat([z_TF, ridge.sqrt() * torch.eye(512)])
    exact_HF = torch.linalg.lstsq(rows, torch.cat([target_TH, ridge.sqrt() * down_HF.T])).solution.T
    layer = (h_TF.float(), parts, run_TN, wanted_TH, down_HF.float())
    got_TH = z_TF @ refit_down(*layer, ridge=0.003).double().T
    assert (got_TH - z_TF @ exact_HF.T).norm() < 1e-3 * (z_TF @ exact_HF.T).norm()


def routed(tokens, width, experts, shared, hidden, seed=0, keep=0.5):
    """Activations, a partition, a routing in which the last expert never runs, W and Y."""
    generator = torch.Generator().manual_seed(seed)
    h_TF = torch.randn(tokens, width, generator=generator)
    order_F = torch.randperm(width, generator=generator)
    parts = Partition(order_F[:shared], order_F[shared:].view(experts, -1), None, 0)
    run_TN = torch.rand(tokens, experts, generator=generator) < keep
    run_TN[:, -1] = False
    down_HF = torch.randn(hidden, width, generator=generator)
    return h_TF, parts, run_TN, down_HF, torch.randn(tokens, hidden, generator=generator)


def summed(h_TF, parts, run_TN, down_HG, wanted_TH, *, batch, biased=False, weight_T=None):
    """Normal equations of some tokens, added batch by batch."""
    equations = NormalEquations.empty(Running.of(parts, run_TN), len(down_HG), biased=biased)
    tokens = (h_TF, parts, run_TN, down_HG, wanted_TH)
    equations.add(batches(*tokens, batch=batch, weight_T=weight_T))
    return equations


def batches(h_TF, parts, run_TN, down_HG, wanted_TH, *, batch, weight_T=None):
    """What a refit needs of some tokens."""
    weight_T = torch.ones(len(h_TF)) if weight_T is None else weight_T
    running = Running.of(parts, run_TN)
    return [
        Batch.of(running, h_TF[rows], run_TN[rows], wanted_TH[rows], down_HG, weight_T[rows])
        for rows in torch.arange(len(h_TF)).split(batch)
    ]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shared", [0, 6])
@pytest.mark.parametrize("batch", [7, 64, 1000])
def test_sums_over_batches_give_the_refit_of_all_tokens(batch, shared, biased):
    h_TF, parts, run_TN, down_HG, wanted_TH = routed(300, 24 + shared, 4, shared, 5)
    if biased:
        down_HG = torch.cat([down_HG, torch.randn(5, 1)], dim=1)
    equations = summed(h_TF, parts, run_TN, down_HG, wanted_TH, batch=batch, biased=biased)
    expected = refit_down(h_TF, parts, run_TN, wanted_TH, down_HG, ridge=0.1)
    # Its ridge is relative to a mean over all columns, the idle ones too.
    got = refitted(equations, down_HG, 0.1 * len(equations.gram_RR) / down_HG.shape[1])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("biased", [False, True])
def test_the_error_on_held_out_tokens_is_that_of_the_output(biased):
    h_TF, parts, run_TN, down_HG, wanted_TH = routed(400, 24, 4, 4, 5)
    if biased:
        down_HG = torch.cat([down_HG, torch.randn(5, 1)], dim=1)
    weight_T = torch.rand(400) + 0.5
    seen, held = (
        (h_TF[rows], parts, run_TN[rows], down_HG, wanted_TH[rows], weight_T[rows])
        for rows in (slice(300), slice(300, 400))
    )
    seen = summed(*seen[:5], batch=70, biased=biased, weight_T=seen[5])
    held = batches(*held[:5], batch=70, weight_T=held[5])
    errors = held_out_errors(seen, held, (0.01, 1.0))
    for ridge, error in errors.items():
        z_TF = torch.zeros(100, 24 + biased)
        z_TF[:, parts.shared_S] = h_TF[300:, parts.shared_S]
        for expert, ids_M in enumerate(parts.experts_NM):
            z_TF[:, ids_M] = h_TF[300:, ids_M] * run_TN[300:, expert, None]
        if biased:
            z_TF[:, -1] = 1
        y_TH = z_TF @ refitted(seen, down_HG, ridge).T
        missing = ((y_TH - wanted_TH[300:]) * weight_T[300:, None]).norm()
        assert error == pytest.approx(
            (missing / (wanted_TH[300:] * weight_T[300:, None]).norm()).item(), rel=1e-3
        )


def test_a_few_noisy_tokens_want_a_strong_ridge_and_many_clean_ones_a_weak_one():
    def best(tokens, noise):
        torch.manual_seed(0)
        h_TF, parts, run_TN, down_HF, _ = routed(tokens + 500, 24, 4, 4, 5, keep=1.0)
        wanted_TH = h_TF @ (down_HF + 0.3 * torch.randn(5, 24)).T
        wanted_TH += noise * torch.randn(wanted_TH.shape)
        first, last = (
            (h_TF[rows], parts, run_TN[rows], down_HF, wanted_TH[rows])
            for rows in (slice(tokens), slice(tokens, None))
        )
        errors = held_out_errors(summed(*first, batch=999), batches(*last, batch=999))
        return min(errors, key=errors.__getitem__)

    assert best(30, noise=5.0) > best(2000, noise=0.01)


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
