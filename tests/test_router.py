# SPDX-License-Identifier: Apache-2.0
"""The analytical router, and the oracle it is compared with."""

import pytest
import torch
from torch.nn.functional import silu

from cmoe_hf import CMoELlamaConfig
from cmoe_hf.conversion.carve.layer import chosen_experts
from cmoe_hf.conversion.carve.router import (
    agreement,
    linear_router,
    oracle_choice,
    output_energies,
    ranking_router,
    representative_router,
)


def small_config(**changes):
    fields = {
        "hidden_size": 8,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 4,
        "shared_expert_intermediate_size": 4,
    }
    return CMoELlamaConfig(**{**fields, **changes})


def test_the_score_is_the_activation_of_the_representative():
    x_TH, gate_FH, up_FH = torch.randn(6, 8), torch.randn(24, 8), torch.randn(24, 8)
    chosen_N = torch.tensor([3, 1, 20, 7, 11])
    router = representative_router(gate_FH, up_FH, chosen_N, normalise=False)
    h_TF = silu(x_TH @ gate_FH.T) * (x_TH @ up_FH.T)
    index_TK = chosen_experts(router, x_TH, small_config())
    assert agreement(index_TK, h_TF[:, chosen_N].topk(2, dim=1).indices) == 1


def test_the_released_router_has_unit_rows_and_absolute_scores():
    x_TH, gate_FH, up_FH = torch.randn(6, 8), torch.randn(24, 8) * 3, torch.randn(24, 8) * 3
    chosen_N = torch.arange(5)
    router = representative_router(gate_FH, up_FH, chosen_N, normalise=True)
    for rows_NH in router.values():
        torch.testing.assert_close(rows_NH.norm(dim=1), torch.ones(5))
    score_TN = silu(x_TH @ router["gate_weight"].T) * (x_TH @ router["up_weight"].T)
    index_TK = chosen_experts(router, x_TH, small_config(router_absolute_score=True))
    assert agreement(index_TK, score_TN.abs().topk(2, dim=1).indices) == 1


def test_agreement_counts_equal_sets_whatever_their_order():
    ours = torch.tensor([[0, 1], [2, 3], [1, 0], [4, 2]])
    theirs = torch.tensor([[1, 0], [2, 4], [1, 0], [2, 4]])
    assert agreement(ours, theirs) == 0.75


@pytest.mark.parametrize("hidden", [3, 2, 1], ids=["narrow", "square", "wide"])
def test_output_energies_are_squared_lengths_of_the_experts_outputs(hidden):
    h_TF, down_HF = torch.randn(5, 6), torch.randn(hidden, 6)
    experts_NM = torch.tensor([[0, 4], [2, 5]])
    energy_TN = output_energies(h_TF, down_HF, experts_NM)
    for token in range(5):
        for expert, ids_M in enumerate(experts_NM):
            output_H = down_HF[:, ids_M] @ h_TF[token, ids_M]
            torch.testing.assert_close(energy_TN[token, expert], output_H.dot(output_H))


def test_the_linear_router_finds_what_is_linear():
    x_TH, truth_NH = torch.randn(500, 8), torch.randn(4, 8)
    energy_TN = x_TH @ truth_NH.T + 50  # a constant for all experts must not matter
    router = linear_router(x_TH, energy_TN, ridge=1e-6)
    score_TN = x_TH @ router["linear_weight"].T
    assert abs(score_TN.std().item() - 1) < 1e-3
    assert agreement(score_TN.topk(2, dim=1).indices, oracle_choice(energy_TN, 2)) == 1


def test_a_single_expert_gets_a_router_of_zeros():
    router = linear_router(torch.randn(50, 8), torch.rand(50, 1), ridge=0.1)
    assert (router["linear_weight"] == 0).all()


def test_a_ranking_router_keeps_more_energy_than_the_regression_it_starts_from():
    torch.manual_seed(0)
    x_TH = torch.randn(4000, 8)
    # Heavy tails: what the regression spends its weights on, and what no choice depends on.
    energy_TN = (x_TH @ torch.randn(8, 6)).mul(1.5).exp()
    start_NH = linear_router(x_TH[:3000], energy_TN[:3000], ridge=0.5)["linear_weight"]
    first, second = (
        ranking_router(x_TH[:3000], energy_TN[:3000], start_NH, top_k=2)["linear_weight"]
        for _ in range(2)
    )
    assert torch.equal(first, second)

    def kept(weight_NH):
        index_TK = (x_TH[3000:] @ weight_NH.T).topk(2, dim=1).indices
        return energy_TN[3000:].gather(1, index_TK).sum() / energy_TN[3000:].sum()

    def right(weight_NH):
        index_TK = (x_TH[3000:] @ weight_NH.T).topk(2, dim=1).indices
        return agreement(index_TK, energy_TN[3000:].topk(2, dim=1).indices)

    assert kept(first) >= kept(start_NH) - 0.01
    assert right(first) > right(start_NH)
