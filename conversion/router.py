# SPDX-License-Identifier: Apache-2.0
"""The analytical router (paper, section 4.3): made of neurons of the dense FFN, not trained.

Shape suffixes: T tokens, H hidden size, F dense FFN width, N routed experts, K active experts.
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


def oracle_choice(mass_TN: torch.Tensor, top_k: int) -> torch.Tensor:
    """The experts that a perfect router would run, (T, K) int64 (eq. 24).

    `mass_TN` is what each expert holds of a token's activation, sum of |h|.
    """
    return mass_TN.topk(top_k, dim=1).indices


def agreement(index_TK: torch.Tensor, other_TK: torch.Tensor) -> float:
    """Share of the tokens for which both choices are the same set of experts."""
    same_T = (index_TK.sort(dim=1).values == other_TK.sort(dim=1).values).all(dim=1)
    return same_T.double().mean().item()
