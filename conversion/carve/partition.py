# SPDX-License-Identifier: Apache-2.0
"""Divide neurons into shared ones and balanced routed experts (paper, section 4.2, A.3).

Shape suffixes: T tokens, F dense FFN width, S shared neurons, R routed neurons, N routed experts,
M neurons of one expert, K marks per token, P experts that are always on.
"""

from typing import NamedTuple

import numpy as np
import ot
import torch
from scipy.sparse import csr_array

from ..errors import CMoEError

CLUSTERING_TOKENS = 4096
"""More tokens than this do not make better clusters of contributions, measured."""


class Partition(NamedTuple):
    """The place of every neuron of the FFN: each is shared, or in exactly one expert."""

    shared_S: torch.Tensor
    """Shared neurons, ascending, int64."""
    experts_NM: torch.Tensor
    """Neurons of each routed expert, ascending in each row, int64."""
    representatives_N: torch.Tensor | None
    """The neuron that represents each expert in the paper's router, int64."""
    iterations: int
    """Assignments solved until the clusters were stable, or the limit."""
    always_on: int = 0
    """How many of the first experts run for every token, as if they were shared."""


def partition_by_marks(
    marks_TK: torch.Tensor,
    score_F: torch.Tensor,
    *,
    shared: int,
    experts: int,
    metric: str = "l2",
    max_iterations: int = 20,
) -> Partition:
    """Divide the neurons by their marks (section 4.2).

    The shared neurons are those of the highest scores, in the paper the activation rates (eq. 16).
    The others are clustered by balanced k-means over their columns of the mark matrix, seeded with
    the highest of them (eq. 17-21). Ties go to the lower index: the result is reproducible.
    """
    order_F, shared_S, routed_R = split_by_score(score_F, shared)
    columns_TR = mark_matrix(marks_TK, len(score_F))[:, routed_R.numpy()]
    seeds_N = np.searchsorted(routed_R.numpy(), order_F[shared : shared + experts].numpy())

    centroids_TN = columns_TR[:, seeds_N].toarray()
    label_R, iterations, stable = np.full(len(routed_R), -1), 0, False
    while iterations < max_iterations and not stable:
        previous_R = label_R
        label_R = assign_balanced(distances(columns_TR, centroids_TN, metric))
        centroids_TN = cluster_means(columns_TR, label_R, experts)
        stable = np.array_equal(label_R, previous_R)
        iterations += 1

    members_NM = np.argsort(label_R, kind="stable").reshape(experts, -1)
    # Eq. 7: the member nearest to the mean of its cluster.
    nearest_RN = distances(columns_TR, centroids_TN, metric)
    member_distance_NM = nearest_RN[members_NM, np.arange(experts)[:, None]]
    chosen_N = members_NM[np.arange(experts), member_distance_NM.argmin(axis=1)]
    experts_NM, representatives_N = (
        routed_R[torch.from_numpy(ids)] for ids in (members_NM, chosen_N)
    )
    return Partition(shared_S, experts_NM, representatives_N, iterations)


def partition_by_contributions(
    h_TF: torch.Tensor,
    down_HF: torch.Tensor,
    score_F: torch.Tensor,
    *,
    shared: int,
    experts: int,
    always_on: int = 0,
    max_iterations: int = 8,
) -> Partition:
    """Divide the neurons by their contributions to the output, |h_j| * ||w_down,j||.

    The shared neurons are those of the highest scores; the next ones make the first `always_on`
    experts. The others are clustered by balanced k-means over their centred contributions, from
    the order of the scores. These are not normalised: neurons that are active together share an
    expert, and so do large ones, which lets the router leave out experts of small ones.
    """
    neurons = (len(score_F) - shared) // experts
    clustered = experts - always_on
    order_F, best_S, routed_R = split_by_score(score_F, shared + always_on * neurons)
    columns_RT = centred_contributions(h_TF, down_HF, routed_R)
    square_R1 = columns_RT.square().sum(dim=1, keepdim=True)
    # Less is rounding: the neurons add the same, or nothing, and any clusters are right.
    least = (1e-6 * square_R1.mean()).clamp_min(torch.finfo(torch.float32).tiny)

    rank_R = torch.empty(len(routed_R), dtype=torch.int64)
    rank_R[torch.searchsorted(routed_R, order_F[len(best_S) :])] = torch.arange(len(routed_R))
    label_R, iterations, stable = rank_R // neurons, 0, False
    while iterations < max_iterations and not stable:
        centroids_NT = columns_RT.new_zeros(clustered, columns_RT.shape[1])
        centroids_NT.index_add_(0, label_R.to(columns_RT.device), columns_RT)
        centroids_NT *= clustered / len(routed_R)
        inner_RN = columns_RT @ centroids_NT.T
        cost_RN = square_R1 + centroids_NT.square().sum(dim=1) - 2 * inner_RN
        previous_R = label_R
        label_R = assign_scaled(cost_RN, least)
        stable = torch.equal(label_R, previous_R)
        iterations += 1
    always_PM = order_F[shared : len(best_S)].view(always_on, neurons).sort(dim=1).values
    members_NM = routed_R[label_R.argsort(stable=True).view(clustered, neurons)]
    experts_NM, shared_S = torch.cat([always_PM, members_NM]), order_F[:shared].sort().values
    return Partition(shared_S, experts_NM, None, iterations, always_on)


def centred_contributions(
    h_TF: torch.Tensor, down_HF: torch.Tensor, routed_R: torch.Tensor
) -> torch.Tensor:
    """Return |h_j| * ||w_down,j|| of some neurons less its mean, for a sample of tokens, (R, T)."""
    sample_TF = h_TF[:: max(1, len(h_TF) // CLUSTERING_TOKENS)]
    # One row a neuron: sums over rows, and products with a few columns, are fast in this layout.
    columns_RT = sample_TF[:, routed_R].T.contiguous().abs_()
    columns_RT *= down_HF.norm(dim=0)[routed_R].unsqueeze(1)
    columns_RT -= columns_RT.mean(dim=1, keepdim=True)
    return columns_RT


def reassigned(
    parts: Partition, h_TF: torch.Tensor, down_HF: torch.Tensor, run_TN: torch.Tensor
) -> Partition:
    """Move each routed neuron to the expert for whose tokens it contributes most.

    Clusters are made before there is a router, of what neurons have in common. Given a router,
    what counts is what its choice keeps: the energy (h_j * ||w_down,j||)^2 of every neuron over the
    tokens for which its expert runs. A balanced assignment makes its sum the largest.

    Args:
        parts: The neurons of each expert; shared ones and experts that are always on stay.
        h_TF: Hidden activations of the dense FFN.
        down_HF: The dense down projection.
        run_TN: True where a routed expert runs.
    """
    always_PM, free_NM = parts.experts_NM.tensor_split([parts.always_on])
    if len(free_NM) < 2:
        return parts
    routed_R = free_NM.flatten().sort().values
    kept_RN = h_TF.new_zeros(len(routed_R), len(free_NM))
    batches = (tensor.split(CLUSTERING_TOKENS) for tensor in (h_TF, run_TN[:, parts.always_on :]))
    for h_BF, run_BN in zip(*batches, strict=True):
        kept_RN += h_BF[:, routed_R].square_().T @ run_BN.to(h_BF.dtype)
    kept_RN *= down_HF.square().sum(dim=0)[routed_R].unsqueeze(1)
    lost_RN = kept_RN.max(dim=1, keepdim=True).values - kept_RN
    # Where nothing is contributed any experts are right.
    label_R = assign_scaled(lost_RN, torch.finfo(torch.float32).tiny)
    members_NM = routed_R[label_R.argsort(stable=True).to(routed_R.device).view_as(free_NM)]
    return parts._replace(experts_NM=torch.cat([always_PM, members_NM]))


def assign_scaled(cost_RN: torch.Tensor, least: torch.Tensor | float) -> torch.Tensor:
    """Assign by costs relative to their mean: the solver's tolerance is absolute."""
    scaled_RN = cost_RN / cost_RN.mean().clamp_min(least)
    return torch.from_numpy(assign_balanced(scaled_RN.cpu().double().numpy()))


def split_by_score(
    score_F: torch.Tensor, shared: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the neurons by falling score; the first `shared`, and the others, both ascending."""
    order_F = torch.argsort(score_F, descending=True, stable=True)
    return order_F, order_F[:shared].sort().values, order_F[shared:].sort().values


def mark_matrix(marks_TK: torch.Tensor, width: int) -> csr_array:
    """Return the paper's binary matrix A (T, F), sparse, from the indices of its ones."""
    tokens, k = marks_TK.shape
    ones = np.ones(tokens * k)
    starts = np.arange(0, tokens * k + 1, k)
    return csr_array((ones, marks_TK.flatten().numpy(), starts), shape=(tokens, width))


def distances(columns_TR: csr_array, centroids_TN: np.ndarray, metric: str) -> np.ndarray:
    """Return the distance of every binary column to every centroid in [0, 1], (R, N) float64.

    `"l2"` is eq. 18, `"l1"` the released code. For a column with n ones and inner product p
    with the centroid, |a - c|_1 = n + sum(c) - 2 p and |a - c|_2^2 = n + sum(c^2) - 2 p: one
    sparse product gives both, and no dense T x R matrix is formed.
    """
    ones_R1 = columns_TR.sum(axis=0)[:, None]
    inner_RN = columns_TR.T @ centroids_TN
    if metric == "l1":
        return ones_R1 + centroids_TN.sum(axis=0) - 2 * inner_RN
    squared_RN = ones_R1 + np.square(centroids_TN).sum(axis=0) - 2 * inner_RN
    return np.sqrt(squared_RN.clip(min=0))  # rounding may fall below zero


def assign_balanced(cost_RN: np.ndarray) -> np.ndarray:
    """Assign R items to N clusters of exactly R / N items at the least total cost, (R,) int64.

    The assignment problem of eq. 20, solved exactly as a transportation problem between R
    sources of mass 1 and N sinks of mass R / N: the same optimum as the square assignment with
    every centroid repeated R / N times, without its R x R matrix.
    """
    items, clusters = cost_RN.shape
    capacity = items // clusters
    plan_RN = ot.emd(
        np.ones(items),
        np.full(clusters, float(capacity)),
        np.ascontiguousarray(cost_RN),
        numItermax=10_000_000,
        check_marginals=False,
    )
    label_R = plan_RN.argmax(axis=1)
    if not np.array_equal(np.bincount(label_R, minlength=clusters), np.full(clusters, capacity)):
        raise CMoEError(
            f"the balanced assignment of {items} neurons to {clusters} experts did not converge. "
            "Please report this with conversion.json of a smaller model."
        )
    return label_R


def cluster_means(columns_TR: csr_array, label_R: np.ndarray, clusters: int) -> np.ndarray:
    """Return the mean column of every cluster, (T, N) float64 (eq. 21). None is empty."""
    items = len(label_R)
    weight = np.full(items, clusters / items)
    membership_RN = csr_array((weight, (np.arange(items), label_R)), shape=(items, clusters))
    return (columns_TR @ membership_RN).toarray()
