"""The refit against the least-squares problem it claims to solve."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmoe_hf.conversion.refit import refit_down


def problem(tokens, width, hidden, seed, keep=0.6):
    """Sparse activations, a projection, and wanted outputs."""
    generator = torch.Generator().manual_seed(seed)
    z_TF = torch.randn(tokens, width, generator=generator)
    z_TF *= torch.rand(tokens, width, generator=generator) < keep
    down_HF = torch.randn(hidden, width, generator=generator)
    return z_TF, down_HF, torch.randn(tokens, hidden, generator=generator)


def in_chunks(z_TF, y_TH, size):
    return zip(z_TF.split(size), y_TH.split(size), strict=True)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 6), st.integers(0, 99))
def test_it_is_the_ridge_regression_that_stays_near_the_dense_weights(tokens, width, hidden, seed):
    z_TF, down_HF, y_TH = problem(tokens, width, hidden, seed)
    if not z_TF.any():
        return
    ridge = 0.1 * z_TF.square().sum(dim=0).mean().item()
    # Ordinary least squares with the ridge as further rows.
    rows = torch.cat([z_TF, ridge**0.5 * torch.eye(width)]).double()
    wanted = torch.cat([y_TH, ridge**0.5 * down_HF.T]).double()
    expected = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T.float()
    got = refit_down(in_chunks(z_TF, y_TH, 7), down_HF, ridge=0.1)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def test_where_nothing_is_missing_nothing_changes():
    z_TF, down_HF, _ = problem(200, 16, 5, 0, keep=1.0)
    got = refit_down(in_chunks(z_TF, z_TF @ down_HF.T, 64), down_HF, ridge=0.003)
    torch.testing.assert_close(got, down_HF, atol=1e-5, rtol=1e-5)


def test_neurons_that_never_run_keep_their_weights():
    z_TF, down_HF, y_TH = problem(100, 12, 4, 1)
    z_TF[:, 3:6] = 0
    got = refit_down(in_chunks(z_TF, y_TH, 100), down_HF, ridge=0.01)
    assert torch.equal(got[:, 3:6], down_HF[:, 3:6])
    assert not torch.equal(got[:, :3], down_HF[:, :3])


def test_nothing_active_at_all_changes_nothing():
    down_HF = torch.randn(3, 8)
    got = refit_down([(torch.zeros(10, 8), torch.randn(10, 3))], down_HF, ridge=0.01)
    assert torch.equal(got, down_HF)


@pytest.mark.parametrize("ridge", [1e-12, 1e-3])
def test_equal_neurons_are_no_trouble(ridge):
    z_TF, down_HF, y_TH = problem(300, 6, 4, 2)
    twice_TF, twice_HF = z_TF.repeat(1, 3) * 1e3, down_HF.repeat(1, 3)
    got = refit_down(in_chunks(twice_TF, y_TH, 100), twice_HF, ridge=ridge)
    assert torch.isfinite(got).all()
    before = (twice_TF @ twice_HF.T - y_TH).norm()
    assert (twice_TF @ got.T - y_TH).norm() < before
