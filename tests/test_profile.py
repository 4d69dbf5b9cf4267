# SPDX-License-Identifier: Apache-2.0
"""Marks and rates against the definition, neuron by neuron."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize, silu

from cmoe_hf.conversion.carve.profile import (
    activation_marks,
    activation_rates,
    activations,
    cosines,
    energies,
    fluctuations,
    weight_ranges,
)


@given(st.integers(1, 30), st.integers(1, 20), st.integers(0, 99), st.data())
def test_marks_are_the_k_largest_absolute_activations(tokens, width, seed, data):
    k = data.draw(st.integers(1, width))
    h_TF = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    for row_F, marks_K in zip(h_TF.abs(), activation_marks(h_TF, k), strict=True):
        assert len(set(marks_K.tolist())) == k
        assert row_F[marks_K].min() >= row_F.sort(descending=True).values[k - 1]


@given(st.integers(1, 30), st.integers(2, 20), st.integers(0, 99), st.data())
def test_rates_are_column_means_and_sum_to_k(tokens, width, seed, data):
    k = data.draw(st.integers(1, width))
    h_TF = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    marks_TK = activation_marks(h_TF, k)
    matrix_TF = torch.zeros(tokens, width, dtype=torch.float64).scatter_(1, marks_TK, 1.0)
    rate_F = activation_rates(marks_TK, width)
    torch.testing.assert_close(rate_F, matrix_TF.mean(dim=0))
    assert rate_F.sum().item() == pytest.approx(k)


def test_cosine_profile_is_the_ffn_of_normalised_tokens_and_neurons():
    x_TH, gate_FH, up_FH = torch.randn(7, 5), torch.randn(9, 5), torch.randn(9, 5)
    got = activations(
        cosines(x_TH @ gate_FH.T, x_TH, gate_FH), cosines(x_TH @ up_FH.T, x_TH, up_FH), silu
    )
    unit_TH = normalize(x_TH, dim=1)
    expected = silu(unit_TH @ normalize(gate_FH, dim=1).T) * (unit_TH @ normalize(up_FH, dim=1).T)
    torch.testing.assert_close(got, expected)


def test_a_dead_neuron_and_an_empty_token_give_zero_not_nan():
    x_TH, w_FH = torch.randn(3, 4), torch.randn(5, 4)
    x_TH[1] = 0
    w_FH[2] = 0
    cosine_TF = cosines(x_TH @ w_FH.T, x_TH, w_FH)
    assert torch.isfinite(cosine_TF).all()
    assert (cosine_TF[1] == 0).all() and (cosine_TF[:, 2] == 0).all()


def test_importance_neuron_by_neuron():
    h_TF, down_HF, gate_FH, up_FH = (torch.randn(4, 4) for _ in range(4))
    for j in range(4):
        length = down_HF[:, j].norm() ** 2
        energy = (h_TF[:, j] ** 2).mean() * length
        assert energies(h_TF, down_HF)[j].item() == pytest.approx(energy.item(), rel=1e-5)
        mean_square = h_TF[:, j].mean() ** 2
        fluctuation = energy - mean_square * length
        assert fluctuations(h_TF, down_HF)[j].item() == pytest.approx(fluctuation.item(), rel=1e-4)
        ranges = sum((w[j].max() - w[j].min()).item() for w in (gate_FH, up_FH))
        assert weight_ranges(gate_FH, up_FH)[j].item() == pytest.approx(ranges, rel=1e-6)
    assert torch.equal(weight_ranges(None, up_FH), weight_ranges(up_FH))
