# SPDX-License-Identifier: Apache-2.0
"""Linear algebra of symmetric matrices, of which half is computed.

Shape suffixes: X equations, H hidden size, T tokens.
"""

import torch

from ..errors import CMoEError


def solve_shifted(gram_XX: torch.Tensor, right_XH: torch.Tensor, shift: float) -> torch.Tensor:
    """(G + shift I)^-1 R by Cholesky; reads the lower triangle of G.

    Needs one more matrix of the size of G: its diagonal is changed meanwhile.
    """
    diagonal_X = gram_XX.diagonal().clone()
    try:
        for attempt in range(5):
            # Rounding can push the smallest eigenvalues below zero; a stronger ridge lifts them.
            gram_XX.diagonal().copy_(diagonal_X + shift * 100**attempt)
            factor_XX, failed = torch.linalg.cholesky_ex(gram_XX)
            if not failed:
                return torch.cholesky_solve(right_XH, factor_XX)
            del factor_XX
    finally:
        gram_XX.diagonal().copy_(diagonal_X)
    raise CMoEError(
        "the refit's Gram matrix is not positive definite even with a strong ridge. Give more "
        "calibration text, or use --recipe paper."
    )


def lower_gram(x_TH: torch.Tensor) -> torch.Tensor:
    """x^T x, (H, H), of which only the lower triangle is filled."""
    gram_HH = x_TH.new_zeros(x_TH.shape[1], x_TH.shape[1])
    for rows in strips(x_TH.shape[1]):
        gram_HH[rows, : rows.stop] = x_TH[:, rows].T @ x_TH[:, : rows.stop]
    return gram_HH


def strips(size: int) -> list[slice]:
    """A range in up to four parts: half a symmetric product costs five eighths of it this way."""
    step = max(64, -(-size // 4))
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
