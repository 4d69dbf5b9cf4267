# SPDX-License-Identifier: Apache-2.0
"""The partition: nothing lost, balanced, and as cheap as the exact square assignment."""

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from cmoe_hf.conversion.carve.partition import (
    assign_balanced,
    distances,
    mark_matrix,
    partition_by_contributions,
    partition_by_marks,
    reassigned,
)
from cmoe_hf.conversion.carve.profile import activation_marks, activation_rates, energies


def random_marks(tokens, width, k, seed):
    """Marks with busy and idle neurons, as in a real FFN."""
    generator = torch.Generator().manual_seed(seed)
    scale_F = torch.linspace(0.2, 2, width)
    return activation_marks(torch.randn(tokens, width, generator=generator) * scale_F, k)


@st.composite
def shapes(draw):
    """(F, S * m, Nr, m) of a valid request."""
    experts, neurons = draw(st.integers(2, 8)), draw(st.integers(1, 12))
    shared = draw(st.integers(0, experts - 1))
    return experts * neurons, shared * neurons, experts - shared, neurons


@settings(max_examples=60, deadline=None)
@given(shapes(), st.integers(0, 99), st.sampled_from(["l1", "l2", "contributions"]), st.data())
def test_every_neuron_is_in_exactly_one_place(shape, seed, metric, data):
    width, shared, experts, neurons = shape
    always_on, iterations = 0, data.draw(st.sampled_from([1, 20]))
    sizes = {"shared": shared, "experts": experts, "max_iterations": iterations}
    if metric == "contributions":
        always_on = data.draw(st.integers(0, experts - 1))
        generator = torch.Generator().manual_seed(seed)
        h_TF, down_HF = torch.randn(40, width, generator=generator), torch.rand(5, width)
        score_F = energies(h_TF, down_HF)
        parts = partition_by_contributions(h_TF, down_HF, score_F, always_on=always_on, **sizes)
    else:
        marks_TK = random_marks(50, width, min(3, width), seed)
        score_F = activation_rates(marks_TK, width)
        parts = partition_by_marks(marks_TK, score_F, metric=metric, **sizes)
        pairs = zip(parts.representatives_N, parts.experts_NM, strict=True)
        assert all(representative in members_M for representative, members_M in pairs)
    placed = torch.cat([parts.shared_S, parts.experts_NM.flatten()])
    assert sorted(placed.tolist()) == list(range(width))
    assert parts.experts_NM.shape == (experts, neurons)
    assert parts.always_on == always_on and parts.iterations <= iterations
    # Shared before always on before the experts that are left to the router.
    places = [parts.shared_S, parts.experts_NM[:always_on], parts.experts_NM[always_on:]]
    scores = [score_F[ids.flatten()] for ids in places if ids.numel()]
    assert all(more.min() >= less.max() for more, less in itertools.pairwise(scores))


def test_neurons_that_are_active_together_end_up_together():
    """Three groups of four neurons, each active as a whole on tokens of its own."""
    groups = torch.tensor([[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]])
    h_TF = torch.randn(300, 12, generator=torch.Generator().manual_seed(0)) * 0.1
    for part, ids in enumerate(groups):
        h_TF[part * 100 : (part + 1) * 100, ids] *= 30 - 5 * part  # the order separates them
    down_HF = torch.ones(2, 12)
    score_F = energies(h_TF, down_HF)
    parts = partition_by_contributions(h_TF, down_HF, score_F, shared=0, experts=3)
    assert sorted(parts.experts_NM.tolist()) == groups.tolist()
    marks_TK = groups.repeat(10, 1)
    rate_F = activation_rates(marks_TK, 12)
    rate_F[torch.tensor([0, 1, 2])] += 1e-6  # one seed per group
    parts = partition_by_marks(marks_TK, rate_F, shared=0, experts=3)
    assert sorted(parts.experts_NM.tolist()) == groups.tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 12), st.integers(0, 999))
def test_assignment_costs_what_the_square_assignment_costs(clusters, capacity, seed):
    cost_RN = np.random.default_rng(seed).random((clusters * capacity, clusters))
    label_R = assign_balanced(cost_RN)
    assert np.bincount(label_R, minlength=clusters).tolist() == [capacity] * clusters
    rows, columns = linear_sum_assignment(np.repeat(cost_RN, capacity, axis=1))
    best = np.repeat(cost_RN, capacity, axis=1)[rows, columns].sum()
    assert cost_RN[np.arange(len(label_R)), label_R].sum() == pytest.approx(best)


def test_on_marks_of_a_real_width_the_cost_is_the_square_assignments():
    columns_TR = mark_matrix(random_marks(2000, 1032, 10, 0), 1032)
    cost_RN = distances(columns_TR, columns_TR[:, -6:].toarray(), "l2")
    label_R = assign_balanced(cost_RN)
    square = np.repeat(cost_RN, 172, axis=1)
    rows, columns = linear_sum_assignment(square)
    ours, best = cost_RN[np.arange(1032), label_R].sum(), square[rows, columns].sum()
    assert ours == pytest.approx(best, rel=1e-12)


@given(st.integers(2, 30), st.integers(4, 12), st.integers(1, 4), st.integers(0, 99))
def test_distances_are_those_of_the_dense_matrix(tokens, width, clusters, seed):
    columns_TR = mark_matrix(random_marks(tokens, width, 3, seed), width)
    centroids_TN = np.random.default_rng(seed).random((tokens, clusters))
    difference_TRN = columns_TR.toarray()[:, :, None] - centroids_TN[:, None, :]
    l1_RN = np.abs(difference_TRN).sum(axis=0)
    l2_RN = np.sqrt(np.square(difference_TRN).sum(axis=0))
    np.testing.assert_allclose(distances(columns_TR, centroids_TN, "l1"), l1_RN, atol=1e-9)
    np.testing.assert_allclose(distances(columns_TR, centroids_TN, "l2"), l2_RN, atol=1e-6)


@pytest.mark.thorough
def test_a_llama_2_7b_layer_is_partitioned_in_seconds_on_one_core():
    marks_TK = random_marks(16_384, 11_008, 10, 0)
    rate_F = activation_rates(marks_TK, 11_008)
    start = time.process_time()  # CPU seconds: what one core would need
    parts = partition_by_marks(
        marks_TK, rate_F, shared=2 * 1376, experts=6, metric="l1", max_iterations=1
    )
    assert parts.experts_NM.shape == (6, 1376)
    assert time.process_time() - start < 3


def test_reassigned_neurons_are_balanced_and_never_with_less_of_what_they_write():
    torch.manual_seed(0)
    h_TF, down_HF = torch.randn(300, 44), torch.randn(7, 44)
    parts = partition_by_contributions(
        h_TF, down_HF, torch.rand(44), shared=4, experts=10, always_on=2
    )
    run_TN = torch.rand(300, 10) < torch.linspace(0.1, 0.9, 10)
    moved = reassigned(parts, h_TF, down_HF, run_TN)

    def kept(experts_NM):
        energy_TF = (h_TF.abs() * down_HF.norm(dim=0)).square()
        pairs = zip(experts_NM, run_TN.T, strict=True)
        return sum(energy_TF[run_T][:, ids_M].sum() for ids_M, run_T in pairs)

    assert kept(moved.experts_NM) > kept(parts.experts_NM)
    assert moved.experts_NM[:2].equal(parts.experts_NM[:2]) and moved.shared_S is parts.shared_S
    everyone_F = torch.cat([moved.shared_S, moved.experts_NM.flatten()]).sort().values
    assert everyone_F.equal(torch.arange(44))
    assert (moved.experts_NM.diff(dim=1) > 0).all()
    # The best of all balanced assignments: no exchange of two neurons would keep more.
    free_NM = moved.experts_NM[2:]
    for left, right in [(0, 1), (2, 7), (4, 5)]:
        for a, b in itertools.product(range(4), range(4)):
            other_NM = free_NM.clone()
            other_NM[left, a], other_NM[right, b] = free_NM[right, b], free_NM[left, a]
            swapped = torch.cat([moved.experts_NM[:2], other_NM])
            assert kept(swapped) <= kept(moved.experts_NM) * (1 + 1e-6)
