# SPDX-License-Identifier: Apache-2.0
"""Refits behind which the layer normalises or scales: what they aim at, and how near they come."""

import pytest
import torch
from torch.nn.functional import rms_norm
from transformers import AutoModel, AutoTokenizer

from cmoe_hf.conversion.carve.recipe import Recipe
from cmoe_hf.conversion.carve.tail import Tail
from cmoe_hf.conversion.embedded import CALIBRATION
from cmoe_hf.conversion.source.calibration import apart_windows, tokenize

TOKENS, HIDDEN = 200, 24
OWN = Recipe.of("refined", error_correction=False)


def norm(y_TH, weight_H):
    return rms_norm(y_TH, (HIDDEN,)) * weight_H


@pytest.fixture
def y_TH():  # noqa: N802 - a tensor's name
    return torch.randn(TOKENS, HIDDEN) * torch.rand(TOKENS, 1).exp2()


@pytest.fixture
def weight_H():  # noqa: N802 - a tensor's name
    return torch.randn(HIDDEN) + 0.5


def test_the_factors_of_a_norm_and_of_a_multiplier_are_found(y_TH, weight_H):
    for added_TH in (norm(y_TH, weight_H), 0.22 * y_TH):
        tail = Tail.measured(y_TH, added_TH)
        found_TH = tail.token_T[:, None] * tail.channel_H * y_TH
        torch.testing.assert_close(found_TH, added_TH, atol=1e-5, rtol=1e-4)


def test_where_nothing_is_missing_it_aims_at_the_dense_output(y_TH, weight_H):
    added_TH = norm(y_TH, weight_H)
    aim_TH = Tail.measured(y_TH, added_TH).aim(y_TH, added_TH, added_TH)
    torch.testing.assert_close(aim_TH, y_TH)


def test_a_multiplier_is_divided_by(y_TH):
    target_TH = torch.randn(TOKENS, HIDDEN)
    aim_TH = Tail.measured(y_TH, 0.22 * y_TH).aim(y_TH, 0.22 * y_TH, target_TH)
    torch.testing.assert_close(0.22 * aim_TH, target_TH, atol=1e-3, rtol=1e-3)


def test_behind_a_norm_it_is_as_near_as_gradient_descent_comes(y_TH, weight_H):
    """The oracle goes through the norm itself; what no output of a norm can be stays missing."""
    added_TH = norm(y_TH, weight_H)
    target_TH = added_TH + 0.2 * torch.randn(TOKENS, HIDDEN)
    aim_TH = Tail.measured(y_TH, added_TH).aim(y_TH, added_TH, target_TH)
    best_TH = y_TH.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([best_TH], max_iter=300)

    def loss():
        optimiser.zero_grad()
        value = (norm(best_TH, weight_H) - target_TH).square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    errors = [
        (norm(it, weight_H) - target_TH).norm().item() for it in (y_TH, aim_TH, best_TH.detach())
    ]
    untouched, ours, oracle = errors
    assert oracle <= ours < oracle + 0.3 * (untouched - oracle)


def test_a_channel_that_the_norm_shuts_is_left_alone(y_TH, weight_H):
    weight_H[3] = 0
    added_TH = norm(y_TH, weight_H)
    target_TH = torch.randn(TOKENS, HIDDEN)
    aim_TH = Tail.measured(y_TH, added_TH).aim(y_TH, added_TH, target_TH)
    torch.testing.assert_close(aim_TH[:, 3], y_TH[:, 3])
    assert aim_TH.isfinite().all()


@pytest.mark.parametrize("family", ["gemma3_text", "granite"])
def test_the_calibration_tokens_leave_the_layers_nearer_to_the_dense_ones(
    make_dense, carve, family
):
    """Than behind a refit to the FFN's own output."""
    source, many = make_dense(family), {"samples": 32}
    ids = tokenize(AutoTokenizer.from_pretrained(source), CALIBRATION.read_text("utf-8"))
    windows_WL = apart_windows(ids, samples=32, length=64, seed=0)
    leaving = []
    for place in (source, carve(source, **many), carve(source, recipe=OWN, **many)):
        model = AutoModel.from_pretrained(place).eval()
        model.layers[-1].register_forward_hook(lambda layer, args, out: leaving.append(out))
        with torch.no_grad():
            model(windows_WL)
    dense, through, own = leaving
    assert (through - dense).norm() < (own - dense).norm()
