# SPDX-License-Identifier: Apache-2.0
"""Down projections refitted in closed form, so that the sparse FFN does the dense one's work.

Let Z (T, F) be the hidden activations, each weighed as its expert is for that token (zero where
the expert does not run), W (H, F) the dense down projection and Y (T, H) the output wanted. The
refit is the ridge regression that stays near W,

    W' = argmin ||Z W'^T - Y||^2 + lambda ||W' - W||^2
       = W + [(Z^T Z + lambda I)^-1 Z^T (Y - Z W^T)]^T,

so that with all experts active, where Z W^T = Y, nothing changes. One Gram matrix a layer; the cost
of inference is as before.

Shape suffixes: T tokens, H hidden size, F dense FFN width.
"""

from collections.abc import Iterable

import torch

from .errors import CMoEError


def refit_down(
    chunks: Iterable[tuple[torch.Tensor, torch.Tensor]], down_HF: torch.Tensor, *, ridge: float
) -> torch.Tensor:
    """The refitted down projection (H, F), float32.

    Args:
        chunks: Weighed activations (t, F) and wanted outputs (t, H) of some tokens at a time.
        down_HF: The dense down projection.
        ridge: lambda, relative to the mean diagonal of the Gram matrix.

    Needs two F x F matrices of float32. Raises `CMoEError` if the system cannot be solved.
    """
    width = down_HF.shape[1]
    gram_FF = down_HF.new_zeros(width, width)
    moment_FH = down_HF.new_zeros(width, down_HF.shape[0])
    for z_tF, y_tH in chunks:
        gram_FF.addmm_(z_tF.T, z_tF)
        moment_FH.addmm_(z_tF.T, y_tH - z_tF @ down_HF.T)
    scale = gram_FF.diagonal().mean().clamp_min(1e-30)
    shift, wanted_shift = 0.0, ridge
    for _ in range(5):
        gram_FF.diagonal().add_(scale * (wanted_shift - shift))
        factor_FF, failed = torch.linalg.cholesky_ex(gram_FF)
        if not failed:
            return down_HF + torch.cholesky_solve(moment_FH, factor_FF).T
        # Rounding can push the smallest eigenvalues below zero; a stronger ridge lifts them.
        shift, wanted_shift = wanted_shift, 100 * wanted_shift
    raise CMoEError(
        "the refit's Gram matrix is not positive definite even with a strong ridge. Give more "
        "calibration text, or use --recipe paper."
    )
