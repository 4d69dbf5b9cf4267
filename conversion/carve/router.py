# SPDX-License-Identifier: Apache-2.0
"""The analytical router (paper, section 4.3): made of neurons of the dense FFN, not trained.

Shape suffixes: T tokens, B tokens of one batch, H hidden size, F dense FFN width, N routed experts,
K active experts, M neurons of one expert, R of all of them, X of what is summed over.
"""

import math
from functools import partial

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, normalize

from .linalg import lower_gram, solve_ridge

ENERGY_TOKENS = 2048
"""Tokens whose experts' outputs are measured at once."""
ALWAYS_ON_BIAS, HIGHEST_BIAS = 2.0, 1.0
"""Balance bias of an expert that runs for every token, and the highest of any other, which with its
probability stays below the first."""


def always_on_mask(bias_N: torch.Tensor, experts: list[int] | None) -> torch.Tensor:
    """Return which experts of a layer run for every token, (N,) bool.

    Args:
        bias_N: The layer's balance bias.
        experts: Their numbers, by the configuration; None in models of cmoe-hf 0.2 and before, and
            in those without such experts: then the bias tells.
    """
    if experts is None:
        return bias_N > HIGHEST_BIAS
    always_on_N = torch.zeros_like(bias_N, dtype=torch.bool)
    always_on_N[experts] = True
    return always_on_N


def representative_router(
    gate_FH: torch.Tensor | None,
    up_FH: torch.Tensor,
    representatives_N: torch.Tensor,
    *,
    gate_bias_F: torch.Tensor | None = None,
    up_bias_F: torch.Tensor | None = None,
    normalise: bool,
) -> dict[str, torch.Tensor]:
    """Return the gate and up rows of the representative neurons, (N, H) each (eq. 8).

    Of an FFN without a gate the up rows only; with biases theirs, too, (N,). With `normalise`,
    every row is scaled to length 1, with its bias, as the released code does.
    """
    scale = partial(normalize, dim=1) if normalise else torch.Tensor.clone
    router = {}
    for part, weight, bias in (("gate", gate_FH, gate_bias_F), ("up", up_FH, up_bias_F)):
        if weight is None:
            continue
        row_NH = weight[representatives_N]
        if bias is None:
            router[f"{part}_weight"] = scale(row_NH)
        else:
            row_NJ = scale(torch.cat([row_NH, bias[representatives_N, None]], dim=1))
            router |= {f"{part}_weight": row_NJ[:, :-1], f"{part}_bias": row_NJ[:, -1]}
    return router


def linear_router(
    x_TH: torch.Tensor, energy_TN: torch.Tensor, *, ridge: float
) -> dict[str, torch.Tensor]:
    """Return router weights (N, H) whose scores x W predict which experts contribute most.

    Ridge regression, without intercept, of each expert's output energy, centred over the experts,
    on the FFN input. `ridge` is relative to the mean square of an input feature. A strong one
    pays: the router must generalise to unseen text.
    """
    target_TN = energy_TN - energy_TN.mean(dim=1, keepdim=True)
    weight_NH = solve_ridge(lower_gram(x_TH), x_TH.T @ target_TN, ridge).T
    return {"linear_weight": unit_scores(weight_NH, x_TH)}


def unit_scores(weight_NH: torch.Tensor, x_TH: torch.Tensor) -> torch.Tensor:
    """Scale a router's weights so that its scores have unit variance.

    This leaves their order alone and keeps the softmax away from saturation.
    """
    score_TN = x_TH @ weight_NH.T
    if score_TN.numel() > 1:  # or there is no deviation
        weight_NH = weight_NH / score_TN.std().clamp_min(1e-30)
    return weight_NH.contiguous()


def ranking_router(
    x_TH: torch.Tensor,
    energy_TN: torch.Tensor,
    start_NH: torch.Tensor,
    *,
    top_k: int,
    epochs: int = 4,
    rate: float = 0.06,
    batch: int = 1024,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Return router weights (N, H) trained to select the `top_k` experts that contribute most.

    Logistic regression from the weights `start_NH` of a `linear_router`. Each decision counts by
    how far the expert's energy lies from the border between running and idling, so that close
    decisions, which cost nothing, are not learnt. Adam with a cosine schedule; the order of the
    tokens comes from `seed`. `rate` is relative to the root mean square of the weights.
    """
    energy_TN = energy_TN / energy_TN.mean().clamp_min(1e-30)
    border_T1 = energy_TN.topk(top_k + 1, dim=1).values[:, -2:].mean(dim=1, keepdim=True)
    weight_NH = (2 * start_NH).requires_grad_()
    peak = rate * start_NH.square().mean().sqrt().item() * 2
    optimiser = torch.optim.Adam([weight_NH], betas=(0.9, 0.999))
    steps, step = epochs * math.ceil(len(x_TH) / batch), 0
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen_B in torch.randperm(len(x_TH), generator=order).split(batch):
            rows_B = chosen_B.to(x_TH.device)
            optimiser.param_groups[0]["lr"] = peak * (1 + math.cos(math.pi * step / steps)) / 2
            above_BN = energy_TN[rows_B] - border_T1[rows_B]
            with torch.enable_grad():
                loss = binary_cross_entropy_with_logits(
                    x_TH[rows_B] @ weight_NH.T, (above_BN > 0).float(), weight=above_BN.abs()
                )
                loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            step += 1
    weight_NH = weight_NH.detach()
    weight_NH = weight_NH - weight_NH.mean(dim=0)  # what all experts share decides nothing
    return {"linear_weight": unit_scores(weight_NH, x_TH)}


def log_energy_router(
    x_TH: torch.Tensor, energy_TN: torch.Tensor, *, ridge: float
) -> dict[str, torch.Tensor]:
    """Return router weights (N, H) and biases (N,) whose scores x W + b predict log energies.

    Scores of several such routers can be compared, also after a logarithm is added to them. Ridge
    regression of the differences from the mean, as in `linear_router`.
    """
    floor = (1e-6 * energy_TN.mean()).clamp_min(1e-30)
    log_TN = (energy_TN + floor).log()
    bias_N = log_TN.mean(dim=0)
    weight_HN = solve_ridge(lower_gram(x_TH), x_TH.T @ (log_TN - bias_N), ridge)
    return {"linear_weight": weight_HN.T.contiguous(), "linear_bias": bias_N}


def output_energies(
    h_TF: torch.Tensor, down_HF: torch.Tensor, experts_NM: torch.Tensor
) -> torch.Tensor:
    """Return the squared length of each expert's output, (T, N): |h W^T|^2 = h (W^T W) h^T."""
    experts, neurons = experts_NM.shape
    ids_R = experts_NM.flatten().to(h_TF.device)
    down_NHM = down_HF[:, ids_R].view(-1, experts, neurons).transpose(0, 1)
    is_wide = neurons > len(down_HF)
    right_NMX = down_NHM.mT if is_wide else down_NHM.mT @ down_NHM
    energies_BN = []
    for h_BF in h_TF.split(ENERGY_TOKENS):
        h_NBM = h_BF.index_select(1, ids_R).view(-1, experts, neurons).transpose(0, 1)
        product_NBX = h_NBM @ right_NMX
        energies_BN.append(product_NBX.mul_(product_NBX if is_wide else h_NBM).sum(dim=2).T)
    return torch.cat(energies_BN)


def oracle_choice(mass_TN: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return the experts that a perfect router would run, (T, K) int64 (eq. 24).

    `mass_TN` is the sum of |h| over each expert's neurons.
    """
    return mass_TN.topk(top_k, dim=1).indices


def agreement(index_TK: torch.Tensor, other_TK: torch.Tensor) -> float:
    """Return the share of the tokens for which both choices are the same set of experts."""
    same_T = (index_TK.sort(dim=1).values == other_TK.sort(dim=1).values).all(dim=1)
    return same_T.double().mean().item()
