# SPDX-License-Identifier: Apache-2.0
"""Activations, ATopK marks and activation rates of neurons (paper, section 4.1, A.2).

Shape suffixes: T tokens, H hidden size, F dense FFN width, K marked neurons per token.
"""

from collections.abc import Callable

import torch

Activation = Callable[[torch.Tensor], torch.Tensor]


def activations(gate_TF: torch.Tensor | None, up_TF: torch.Tensor, act: Activation) -> torch.Tensor:
    """Return hidden activations h = act(x Wg) * (x Wu) from the two products, (T, F).

    Without a gate h = act(x W + b).
    """
    return act(up_TF) if gate_TF is None else act(gate_TF) * up_TF


def cosines(
    z_TF: torch.Tensor,
    x_TH: torch.Tensor,
    w_FH: torch.Tensor,
    bias_F: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return z = x Wᵀ with every token and every neuron scaled to length 1, (T, F).

    The released code profiles these instead of the true products. A bias, which z includes, is
    the weight of one more input that is always 1.
    """
    tiny = torch.finfo(z_TF.dtype).tiny
    length_T1, length_F = x_TH.norm(dim=1, keepdim=True), w_FH.norm(dim=1)
    if bias_F is not None:
        length_T1, length_F = length_T1.square().add(1).sqrt(), length_F.hypot(bias_F)
    scale_T1 = length_T1.clamp_min(tiny).reciprocal()
    return (z_TF * scale_T1).mul_(length_F.clamp_min(tiny).reciprocal())


def activation_marks(h_TF: torch.Tensor, k: int) -> torch.Tensor:
    """Return the k neurons of largest |h| of every token (ATopK), (T, K) int64, unordered.

    These indices are the positions of the ones in the paper's binary matrix A.
    """
    return h_TF.abs().topk(k, dim=1, sorted=False).indices


def activation_rates(marks_TK: torch.Tensor, width: int) -> torch.Tensor:
    """Return the share of the tokens that mark each neuron, (F,) float64: column means of A."""
    counts_F = torch.bincount(marks_TK.flatten(), minlength=width)
    return counts_F.double() / len(marks_TK)


def energies(h_TF: torch.Tensor, down_HF: torch.Tensor) -> torch.Tensor:
    """Return the mean square of what each neuron adds to the output, (F,) float64 on the CPU.

    It is E[h_j^2] * ||w_down,j||^2.
    """
    # Moved before it is widened: not every accelerator has float64.
    square_F = h_TF.square().mean(dim=0).cpu().double()
    return square_F * down_HF.square().sum(dim=0).cpu().double()


def fluctuations(h_TF: torch.Tensor, down_HF: torch.Tensor) -> torch.Tensor:
    """Return FLAP's measure (arXiv 2312.11983), Var[h_j] * ||w_down,j||^2, (F,) float64 on the CPU.

    A bias can replace the mean of a neuron, but not its fluctuation.
    """
    variance_F = h_TF.var(dim=0, correction=0).cpu().double()
    return variance_F * down_HF.square().sum(dim=0).cpu().double()


def weight_ranges(*weights_FH: torch.Tensor | None) -> torch.Tensor:
    """Return the range of each neuron's weights, summed over the matrices, (F,) float64 on the CPU.

    Pruning by maximum absolute weight uses this measure; it needs no calibration text.
    """
    ranges = [w.amax(dim=1) - w.amin(dim=1) for w in weights_FH if w is not None]
    return torch.stack(ranges).sum(dim=0).cpu().double()
