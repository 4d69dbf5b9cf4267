# SPDX-License-Identifier: Apache-2.0
"""Down projections refitted in closed form, so that the sparse FFN does the dense one's work.

Let Z (T, F) be the hidden activations, zero where the neuron's expert does not run, W (H, F) the
dense down projection and Y (T, H) the output wanted. The refit is the ridge regression that stays
near W,

    W' = argmin ||Z W'^T - Y||^2 + lambda ||W' - W||^2
       = W + [(Z^T Z + lambda I)^-1 Z^T D]^T        with D = Y - Z W^T,
       = W + [Z^T (Z Z^T + lambda I)^-1 D]^T,

so that with all experts active, where Z W^T = Y, nothing changes. The first form factors an F x F
matrix, the second a T x T one; both are exact and the smaller one is used. Neither multiplies by
the zeros of Z: it is kept as one block for each expert.

Shape suffixes: T tokens, H hidden size, F dense FFN width, N routed experts, U tokens of one block,
M neurons of one block.
"""

from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import NamedTuple

import numpy as np
import torch

from .linalg import solve_shifted
from .partition import Partition


class Block(NamedTuple):
    """What one expert contributes to Z."""

    tokens_U: torch.Tensor
    """Tokens for which the expert runs, ascending, int64."""
    neurons_M: torch.Tensor
    """Its neurons, int64."""
    z_UM: torch.Tensor
    """Their hidden activations."""


def active_blocks(
    h_TF: torch.Tensor, parts: Partition, run_TN: torch.Tensor, *, biased: bool = False
) -> list[Block]:
    """The block of the shared expert and those of the routed experts, where they run at all.

    Args:
        h_TF: Hidden activations of the dense FFN.
        parts: Whose neurons are whose.
        run_TN: True where a routed expert runs.
        biased: With one more block, neuron F, that is always 1: the output bias. It is refitted
            with the others, and can make up for what idle experts write on average.
    """
    everywhere_T = torch.arange(len(h_TF), device=h_TF.device)
    rows = [everywhere_T, *(run_T.nonzero().squeeze(1) for run_T in run_TN.T)]
    members = [ids_M.to(h_TF.device) for ids_M in (parts.shared_S, *parts.experts_NM)]
    blocks = [
        # Columns first where all rows are wanted: much faster than picking single elements.
        Block(t, m, h_TF[:, m] if len(t) == len(h_TF) else h_TF[t.unsqueeze(1), m])
        for t, m in zip(rows, members, strict=True)
        if len(t) and len(m)
    ]
    if biased:
        neuron = torch.tensor([h_TF.shape[1]], device=h_TF.device)
        blocks.append(Block(everywhere_T, neuron, h_TF.new_ones(len(h_TF), 1)))
    return blocks


def down_projected(blocks: Sequence[Block], down_HF: torch.Tensor, tokens: int) -> torch.Tensor:
    """Output of the sparse FFN, Z W^T, (T, H) (paper, eq. 2)."""
    y_TH = down_HF.new_zeros(tokens, down_HF.shape[0])
    for block in blocks:
        y_TH.index_add_(0, block.tokens_U, block.z_UM @ down_HF[:, block.neurons_M].T)
    return y_TH


def refit_down(
    blocks: Sequence[Block], wanted_TH: torch.Tensor, down_HF: torch.Tensor, *, ridge: float
) -> torch.Tensor:
    """The refitted down projection W' (H, F), float32.

    Args:
        blocks: Z, see `active_blocks`.
        wanted_TH: Y.
        down_HF: W.
        ridge: lambda, relative to the mean square of a column of Z.

    Needs two square matrices of the smaller of T and F, and two of the shape of W, in float32.
    Raises `CMoEError` if the system cannot be solved.
    """
    tokens, width = len(wanted_TH), down_HF.shape[1]
    missing_TH = wanted_TH - down_projected(blocks, down_HF, tokens)
    if not blocks:
        return down_HF.clone()
    energy = sum(float(block.z_UM.square().sum()) for block in blocks)
    shift = max(ridge * energy / width, 1e-30)
    refitted_HF = down_HF.clone()
    if width <= tokens:
        change_FH = solve_shifted(gram(blocks), transposed_product(blocks, missing_TH), shift)
        changes = iter(change_FH.split([len(block.neurons_M) for block in blocks]))
    else:
        solution_TH = solve_shifted(token_gram(blocks, missing_TH), missing_TH, shift)
        changes = (block.z_UM.T @ solution_TH[block.tokens_U] for block in blocks)
    for block, change_MH in zip(blocks, changes, strict=True):
        refitted_HF[:, block.neurons_M] += change_MH.T
    return refitted_HF


def ridge_for(tokens: int, width: int, ridge: float) -> float:
    """The ridge where a neuron has fewer tokens than the ten that `ridge` was tuned for.

    It grows with the square of what is missing, as the best one did, measured: otherwise the refit
    would learn the calibration text by heart.
    """
    return ridge * max(1.0, (10 * width / max(tokens, 1)) ** 2)


def gram(blocks: Sequence[Block]) -> torch.Tensor:
    """Z^T Z, (F, F), neurons in the order of the blocks. Only its lower triangle is filled."""
    ends = np.cumsum([len(block.neurons_M) for block in blocks])
    spans = [slice(end - len(b.neurons_M), end) for end, b in zip(ends, blocks, strict=True)]
    gram_FF = blocks[0].z_UM.new_zeros(int(ends[-1]), int(ends[-1]))
    for left, right in combinations_with_replacement(range(len(blocks)), 2):
        a, b = blocks[left], blocks[right]
        z_VM, z_VN = b.z_UM, a.z_UM
        if left != right:
            z_VM = rows_of(b, torch.isin(b.tokens_U, a.tokens_U, assume_unique=True))
            z_VN = rows_of(a, torch.isin(a.tokens_U, b.tokens_U, assume_unique=True))
        gram_FF[spans[right], spans[left]] = z_VM.T @ z_VN
    return gram_FF


def rows_of(block: Block, chosen_U: torch.Tensor) -> torch.Tensor:
    """The activations of some of a block's tokens."""
    return block.z_UM if bool(chosen_U.all()) else block.z_UM[chosen_U]


def token_gram(blocks: Sequence[Block], like_TH: torch.Tensor) -> torch.Tensor:
    """Z Z^T, (T, T)."""
    gram_TT = like_TH.new_zeros(len(like_TH), len(like_TH))
    for block in blocks:
        gram_TT[block.tokens_U.unsqueeze(1), block.tokens_U] += block.z_UM @ block.z_UM.T
    return gram_TT


def transposed_product(blocks: Sequence[Block], right_TH: torch.Tensor) -> torch.Tensor:
    """Z^T R, (F, H), neurons in the order of the blocks."""
    return torch.cat([block.z_UM.T @ right_TH[block.tokens_U] for block in blocks])
