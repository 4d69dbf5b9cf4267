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
    cluster_means,
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


@settings(max_examples=40, deadline=None)
@given(shapes(), st.integers(0, 99), st.sampled_from(["l1", "l2"]), st.sampled_from([1, 20]))
def test_every_neuron_is_in_exactly_one_place(shape, seed, metric, iterations):
    width, shared, experts, neurons = shape
    marks_TK = random_marks(50, width, min(3, width), seed)
    rate_F = activation_rates(marks_TK, width)
    parts = partition_by_marks(
        marks_TK, rate_F, shared=shared, experts=experts, metric=metric, max_iterations=iterations
    )
    placed = torch.cat([parts.shared_S, parts.experts_NM.flatten()])
    assert sorted(placed.tolist()) == list(range(width))
    assert parts.experts_NM.shape == (experts, neurons)
    assert parts.iterations <= iterations
    if shared:
        routed_F = rate_F[parts.experts_NM.flatten()]
        assert rate_F[parts.shared_S].min() >= routed_F.max()
    for representative, members_M in zip(parts.representatives_N, parts.experts_NM, strict=True):
        assert representative in members_M


@settings(max_examples=30, deadline=None)
@given(shapes(), st.integers(0, 99), st.data())
def test_clusters_of_contributions_lose_no_neuron_either(shape, seed, data):
    width, shared, experts, neurons = shape
    always_on = data.draw(st.integers(0, experts - 1))
    generator = torch.Generator().manual_seed(seed)
    h_TF, down_HF = torch.randn(40, width, generator=generator), torch.rand(5, width)
    score_F = energies(h_TF, down_HF)
    parts = partition_by_contributions(
        h_TF, down_HF, score_F, shared=shared, experts=experts, always_on=always_on
    )
    placed = torch.cat([parts.shared_S, parts.experts_NM.flatten()])
    assert sorted(placed.tolist()) == list(range(width))
    assert parts.experts_NM.shape == (experts, neurons)
    assert parts.always_on == always_on
    # Shared before always on before the experts that are left to the router.
    places = [parts.shared_S, parts.experts_NM[:always_on], parts.experts_NM[always_on:]]
    scores = [score_F[ids.flatten()] for ids in places if ids.numel()]
    assert all(more.min() >= less.max() for more, less in itertools.pairwise(scores))


def test_neurons_that_write_together_end_up_together():
    """Three groups of four neurons, each with an envelope of its own over the tokens."""
    groups = torch.tensor([[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]])
    h_TF = torch.randn(300, 12, generator=torch.Generator().manual_seed(0)) * 0.1
    for part, ids in enumerate(groups):
        h_TF[part * 100 : (part + 1) * 100, ids] *= 30 - 5 * part  # the order separates them
    down_HF = torch.ones(2, 12)
    score_F = energies(h_TF, down_HF)
    parts = partition_by_contributions(h_TF, down_HF, score_F, shared=0, experts=3)
    assert sorted(parts.experts_NM.tolist()) == groups.tolist()


def test_energies_are_mean_squared_lengths():
    h_TF, down_HF = torch.randn(30, 4), torch.randn(5, 4)
    written_TFH = h_TF[:, :, None] * down_HF.T
    expected_F = written_TFH.square().sum(dim=2).mean(dim=0).double()
    torch.testing.assert_close(energies(h_TF, down_HF), expected_F, rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 12), st.integers(0, 999))
def test_assignment_costs_what_the_square_assignment_costs(clusters, capacity, seed):
    cost_RN = np.random.default_rng(seed).random((clusters * capacity, clusters))
    label_R = assign_balanced(cost_RN)
    assert np.bincount(label_R, minlength=clusters).tolist() == [capacity] * clusters
    rows, columns = linear_sum_assignment(np.repeat(cost_RN, capacity, axis=1))
    best = np.repeat(cost_RN, capacity, axis=1)[rows, columns].sum()
    assert cost_RN[np.arange(len(label_R)), label_R].sum() == pytest.approx(best)


@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_on_marks_of_a_real_width_the_cost_is_the_square_assignments(metric):
    columns_TR = mark_matrix(random_marks(2000, 1032, 10, 0), 1032)
    cost_RN = distances(columns_TR, columns_TR[:, -6:].toarray(), metric)
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


def test_cluster_means_are_means():
    columns_TR = mark_matrix(random_marks(20, 12, 3, 0), 12)
    label_R = np.array([0, 1, 2] * 4)
    means_TN = cluster_means(columns_TR, label_R, 3)
    for cluster in range(3):
        expected_T = columns_TR.toarray()[:, label_R == cluster].mean(axis=1)
        np.testing.assert_allclose(means_TN[:, cluster], expected_T)


def test_under_balance_l1_and_squared_l2_have_the_same_optimum():
    """Method section 4: only the cost differs, by a constant, on binary columns."""
    columns_TR = mark_matrix(random_marks(60, 24, 4, 3), 24)
    centroids_TN = columns_TR[:, [20, 21, 22, 23]].toarray()
    l1_RN = distances(columns_TR, centroids_TN, "l1")
    squared_RN = distances(columns_TR, centroids_TN, "l2") ** 2
    inner_RN = -(columns_TR.T @ centroids_TN)
    items = np.arange(24)
    for cost_RN in (l1_RN, squared_RN):
        for other_RN in (l1_RN, squared_RN, inner_RN):
            label_R = assign_balanced(other_RN)
            best_R = assign_balanced(cost_RN)
            assert cost_RN[items, label_R].sum() == pytest.approx(cost_RN[items, best_R].sum())


def test_neurons_that_fire_together_end_up_together():
    """Three groups of four neurons, each marked as a whole by its own tokens."""
    groups = torch.tensor([[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]])
    marks_TK = groups.repeat(10, 1)
    rate_F = activation_rates(marks_TK, 12)
    rate_F[torch.tensor([0, 1, 2])] += 1e-6  # one seed per group
    parts = partition_by_marks(marks_TK, rate_F, shared=0, experts=3)
    assert sorted(parts.experts_NM.tolist()) == groups.tolist()


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
