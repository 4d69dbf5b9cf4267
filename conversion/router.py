# SPDX-License-Identifier: Apache-2.0
"""The analytical router (paper, section 4.3): made of neurons of the dense FFN, not trained.

Shape suffixes: T tokens, H hidden size, F dense FFN width, N routed experts, M neurons of one
expert, K active experts.
"""

import torch


def representative_router(
    gate_FH: torch.Tensor, up_FH: torch.Tensor, representatives_N: torch.Tensor, *, normalise: bool
) -> dict[str, torch.Tensor]:
    """Router weights: the gate and up rows of the representative neurons, (N, H) each (eq. 8).

    With `normalise`, every row is scaled to length 1, as the released code does.
    """
    rows = {"gate_weight": gate_FH[representatives_N], "up_weight": up_FH[representatives_N]}
    if normalise:
        rows = {
            name: torch.nn.functional.normalize(row_NH.float(), dim=1).to(row_NH.dtype)
            for name, row_NH in rows.items()
        }
    return rows


def expert_mass(h_TF: torch.Tensor, experts_NM: torch.Tensor) -> torch.Tensor:
    """What each expert holds of a token's activation, sum of |h|, (T, N) (eq. 24)."""
    return torch.stack([h_TF[:, ids_M].abs().sum(dim=1) for ids_M in experts_NM], dim=1)


def oracle_choice(mass_TN: torch.Tensor, top_k: int) -> torch.Tensor:
    """The experts that a perfect router would run: the largest masses, (T, K) int64."""
    return mass_TN.topk(top_k, dim=1).indices


def agreement(index_TK: torch.Tensor, other_TK: torch.Tensor) -> float:
    """Share of the tokens for which both choices are the same set of experts."""
    same_T = (index_TK.sort(dim=1).values == other_TK.sort(dim=1).values).all(dim=1)
    return same_T.double().mean().item()
