# SPDX-License-Identifier: Apache-2.0
"""Fit linear routers to a carved model that has another kind.

Shape suffixes: W windows, L tokens of a window, T tokens, H hidden size, N routed experts.
"""

from contextlib import ExitStack

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from cmoe_hf.modeling_cmoe import ExpertsLoop

from ..carve.linalg import solve_shifted
from ..measure.routing import sparse_blocks


@torch.no_grad()
def linear_routers(
    model: PreTrainedModel, windows_WL: torch.Tensor, *, ridge: float
) -> list[torch.Tensor]:
    """Return router weights (N, H) float32 of each layer, as `router.linear_router` fits them.

    Only sums over the tokens are kept, so that all layers are fitted in one run of the model.

    Args:
        model: A carved model.
        windows_WL: Calibration windows, int64.
        ridge: Relative to the mean square of an input feature.
    """
    sums = [Sums(block.experts) for block in sparse_blocks(model)]
    with ExitStack() as stack:
        for block, here in zip(sparse_blocks(model), sums, strict=True):
            stack.callback(block.register_forward_pre_hook(here).remove)
        for window_L in tqdm(windows_WL, desc="fitting routers", unit="window", disable=None):
            model(window_L[None].to(model.device), use_cache=False, logits_to_keep=1)
    return [here.router(ridge) for here in sums]


class Sums:
    """Sums over the tokens for the regression of one layer; a forward pre-hook."""

    def __init__(self, experts: ExpertsLoop) -> None:
        self.experts = experts
        hidden, device = experts.hidden_dim, experts.down_proj.device
        self.gram_HH = torch.zeros(hidden, hidden, device=device)
        self.cross_HN = torch.zeros(hidden, experts.num_experts, device=device)
        self.sum_H = torch.zeros(hidden, device=device)
        self.tokens = 0

    def __call__(self, block: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        """Add the tokens that enter a block."""
        x_TH = inputs[0].reshape(-1, inputs[0].shape[-1])
        energy_TN = expert_energies(self.experts, x_TH)
        x_TH = x_TH.float()
        self.gram_HH += x_TH.T @ x_TH
        self.cross_HN += x_TH.T @ (energy_TN - energy_TN.mean(dim=1, keepdim=True))
        self.sum_H += x_TH.sum(dim=0)
        self.tokens += len(x_TH)

    def router(self, ridge: float) -> torch.Tensor:
        """Return the weights; their scores have unit variance over tokens and experts."""
        shift = max(ridge * self.gram_HH.diagonal().mean().item(), 1e-30)
        weight_HN = solve_shifted(self.gram_HH, self.cross_HN, shift)
        count = self.tokens * weight_HN.shape[1]
        square = (weight_HN * (self.gram_HH @ weight_HN)).sum() / count
        mean = (self.sum_H @ weight_HN).sum() / count
        deviation = (square - mean.square()).clamp_min(1e-30).sqrt()
        return (weight_HN / deviation).T.contiguous()


def expert_energies(experts: ExpertsLoop, x_TH: torch.Tensor) -> torch.Tensor:
    """Return the squared length of every expert's output for every token, (T, N) float32."""
    energies = [
        experts.run_expert(expert, x_TH).float().square().sum(dim=1)
        for expert in range(experts.num_experts)
    ]
    return torch.stack(energies, dim=1)
