# SPDX-License-Identifier: Apache-2.0
"""The refit against the least-squares problem it claims to solve."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmoe_hf.conversion.carve.partition import Partition
from cmoe_hf.conversion.carve.refit import active_blocks, down_projected, refit_down


def problem(tokens, shape, hidden, seed, keep=0.6):
    """Blocks, the same activations with their zeros, a projection, and wanted outputs."""
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
    return active_blocks(h_TF, parts, run_TN), h_TF * mask_TF, down_HF, wanted_TH


shapes = st.tuples(st.integers(0, 2), st.integers(1, 4), st.integers(1, 5))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), shapes, st.integers(1, 6), st.integers(0, 99))
def test_it_is_the_ridge_regression_that_stays_near_the_dense_weights(tokens, shape, hidden, seed):
    blocks, z_TF, down_HF, wanted_TH = problem(tokens, shape, hidden, seed)
    width = z_TF.shape[1]
    ridge = 0.1 * z_TF.square().sum(dim=0).mean().item()
    # Ordinary least squares with the ridge as further rows.
    rows = torch.cat([z_TF, ridge**0.5 * torch.eye(width)]).double()
    wanted = torch.cat([wanted_TH, ridge**0.5 * down_HF.T]).double()
    expected = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T.float()
    if ridge == 0:
        expected = down_HF
    got = refit_down(blocks, wanted_TH, down_HF, ridge=0.1)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), shapes, st.floats(0, 1), st.integers(0, 99))
def test_the_sparse_output_is_that_of_the_masked_activations(tokens, shape, keep, seed):
    blocks, z_TF, down_HF, _ = problem(tokens, shape, 5, seed, keep)
    got = down_projected(blocks, down_HF, tokens)
    torch.testing.assert_close(got, z_TF @ down_HF.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [15, 200])
def test_where_nothing_is_missing_nothing_changes(tokens):
    blocks, z_TF, down_HF, _ = problem(tokens, (1, 3, 4), 5, 0, keep=1.0)
    got = refit_down(blocks, z_TF @ down_HF.T, down_HF, ridge=0.003)
    torch.testing.assert_close(got, down_HF, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [10, 100])
def test_experts_that_never_run_keep_their_weights(tokens):
    h_TF, down_HF = torch.randn(tokens, 12), torch.randn(4, 12)
    parts = Partition(torch.arange(4), torch.arange(4, 12).view(2, 4), None, 0)
    run_TN = torch.tensor([[True, False]]).expand(tokens, 2)
    got = refit_down(
        active_blocks(h_TF, parts, run_TN), torch.randn(tokens, 4), down_HF, ridge=0.01
    )
    assert torch.equal(got[:, 8:], down_HF[:, 8:])
    assert not torch.isclose(got[:, :8], down_HF[:, :8]).any()


def test_nothing_running_at_all_changes_nothing():
    parts = Partition(torch.arange(0), torch.arange(8).view(2, 4), None, 0)
    blocks = active_blocks(torch.randn(10, 8), parts, torch.zeros(10, 2, dtype=torch.bool))
    down_HF = torch.randn(3, 8)
    assert torch.equal(refit_down(blocks, torch.randn(10, 3), down_HF, ridge=0.01), down_HF)


@pytest.mark.parametrize("ridge", [1e-12, 1e-3])
def test_equal_neurons_are_no_trouble(ridge):
    z_TF, down_HF, wanted_TH = torch.randn(300, 6), torch.randn(4, 6), torch.randn(300, 4)
    twice_TF, twice_HF = z_TF.repeat(1, 3) * 1e3, down_HF.repeat(1, 3)
    parts = Partition(torch.arange(6), torch.arange(6, 18).view(3, 4), None, 0)
    blocks = active_blocks(twice_TF, parts, torch.ones(300, 3, dtype=torch.bool))
    got = refit_down(blocks, wanted_TH, twice_HF, ridge=ridge)
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
    outputs = []
    for dtype in (torch.float32, torch.float64):
        blocks = active_blocks(h_TF.to(dtype), parts, run_TN)
        got = refit_down(blocks, wanted_TH.to(dtype), down_HF.to(dtype), ridge=0.003)
        outputs.append(down_projected(blocks, got, tokens).double())
    assert (outputs[0] - outputs[1]).norm() < 1e-3 * outputs[1].norm()
