# SPDX-License-Identifier: Apache-2.0
"""Refit, polish, refit: what comes out is better on text that none of it has seen."""

import pytest
import torch
from test_polish import HIDDEN, TOKENS, carved, slow_output

from cmoe_hf.conversion.carve.polish import Schedule
from cmoe_hf.conversion.carve.reconstruct import reconstruct
from cmoe_hf.conversion.carve.refit import refit_down


def error(result, parts, run_TN, x_TH, wanted_TH):
    """Relative error of the sparse output, token by token."""
    y_TH = slow_output(result.ffn, result.down_HG, parts, run_TN, x_TH)
    return ((y_TH - wanted_TH).norm() / wanted_TH.norm()).item()


@pytest.mark.parametrize(("gated", "biased"), [(True, False), (False, True)])
def test_polish_beats_refit_beats_nothing_on_unseen_tokens(gated, biased):
    ffn, down_HG, parts, run_TN, x_TH, wanted_TH = carved(gated=gated, biased=biased)
    given, rest = slice(500), slice(500, None)
    problem = (ffn, parts, run_TN[given], x_TH[given], wanted_TH[given])
    plain = reconstruct(*problem, held=100)
    polished = reconstruct(*problem, held=100, schedule=Schedule(epochs=20, batch=50, rate=0.02))
    before = slow_output(ffn, down_HG, parts, run_TN[rest], x_TH[rest])
    unseen = (run_TN[rest], x_TH[rest], wanted_TH[rest])
    nothing = ((before - wanted_TH[rest]).norm() / wanted_TH[rest].norm()).item()
    assert error(polished, parts, *unseen) < error(plain, parts, *unseen) < nothing
    assert polished.held_out_error < plain.held_out_error


def test_without_polish_it_is_the_refit_of_all_tokens_with_the_best_ridge():
    ffn, down_HG, parts, run_TN, x_TH, wanted_TH = carved()
    result = reconstruct(ffn, parts, run_TN, x_TH, wanted_TH, held=100)
    assert result.ridge == min(result.refit_errors, key=result.refit_errors.get)
    # The last expert never runs: the mean over all columns is smaller than over the others.
    ridge = result.ridge * ffn.width / (ffn.width - parts.experts_NM.shape[1])
    expected = refit_down(ffn.hidden(x_TH), parts, run_TN, wanted_TH, down_HG, ridge=ridge)
    torch.testing.assert_close(result.down_HG, expected, atol=1e-3, rtol=1e-3)
    assert result.ffn.up_FH is ffn.up_FH


def test_where_nothing_is_missing_nothing_changes():
    ffn, down_HG, parts, _, x_TH, wanted_TH = carved()
    run_TN = torch.ones(TOKENS, len(parts.experts_NM), dtype=torch.bool)
    result = reconstruct(ffn, parts, run_TN, x_TH, wanted_TH, held=100, schedule=Schedule(epochs=3))
    torch.testing.assert_close(result.down_HG, down_HG, atol=1e-5, rtol=1e-5)
    assert torch.equal(result.ffn.up_FH, ffn.up_FH)
    assert result.down_HG.shape == (HIDDEN, ffn.width)
