# SPDX-License-Identifier: Apache-2.0
"""Linear algebra of symmetric matrices, of which only the lower triangle is computed.

Shape suffixes: X equations, H hidden size, T tokens.
"""

import torch

from ..errors import CMoEError


def solve_shifted(gram_XX: torch.Tensor, right_XH: torch.Tensor, shift: float) -> torch.Tensor:
    """Return (G + shift I)^-1 R by Cholesky, from the lower triangle of G.

    Allocates one more matrix of the size of G; the diagonal of G is changed meanwhile. Raises
    `CMoEError` if the matrix is not positive definite.
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


def solve_ridge(gram_XX: torch.Tensor, right_XH: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return (G + lambda I)^-1 R with lambda = `ridge` * the mean of G's diagonal."""
    shift = max(ridge * gram_XX.diagonal().mean().item(), 1e-30)
    return solve_shifted(gram_XX, right_XH, shift)


def lower_gram(x_TH: torch.Tensor) -> torch.Tensor:
    """Return x^T x, (H, H), with only its lower triangle filled."""
    gram_HH = x_TH.new_zeros(x_TH.shape[1], x_TH.shape[1])
    add_lower_gram(gram_HH, x_TH)
    return gram_HH


def add_lower_gram(gram_HH: torch.Tensor, x_TH: torch.Tensor) -> None:
    """Add x^T x to the lower triangle of `gram_HH`.

    In four strips, which cost five eighths of the whole product.
    """
    size = len(gram_HH)
    step = max(64, -(-size // 4))
    for start in range(0, size, step):
        stop = min(start + step, size)
        gram_HH[start:stop, :stop] += x_TH[:, start:stop].T @ x_TH[:, :stop]
