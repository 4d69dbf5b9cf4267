# SPDX-License-Identifier: Apache-2.0
"""What a layer makes of its FFN's output before it reaches the residual stream.

Most layers add y as it is. Some normalise it first (Gemma, OLMo 2, GLM-4) or scale it (Granite).
What they add is then near a_t b_c y_tc, with a factor for each token and one for each channel: of
an RMS norm with weight g, a = 1 / rms(y) and b = g. Both are measured, so that no family's norm is
written a second time, and a refit can aim at the y that the layer would turn into its target.

Shape suffixes: T tokens, H hidden size.
"""

from typing import NamedTuple, Self

import torch

SWEEPS = 12
"""Of the alternating least squares that measures the factors."""


class Tail(NamedTuple):
    """Factors between an FFN's output and what its layer adds to the residual stream."""

    token_T: torch.Tensor
    channel_H: torch.Tensor

    @classmethod
    def measured(cls, y_TH: torch.Tensor, added_TH: torch.Tensor) -> Self:
        """Return the factors for which a_t b_c y_tc is nearest to what was added."""
        tiny = torch.finfo(y_TH.dtype).tiny
        product_TH, square_TH = y_TH * added_TH, y_TH.square()
        channel_H = torch.ones_like(y_TH[0])
        for _ in range(SWEEPS):
            token_T = product_TH @ channel_H / (square_TH @ channel_H.square()).clamp_min(tiny)
            weight_T = token_T.square()
            channel_H = token_T @ product_TH / (weight_T @ square_TH).clamp_min(tiny)
        return cls(token_T, channel_H)

    @property
    def normalises(self) -> bool:
        """Return whether tokens have factors of their own, as behind a norm."""
        return bool(self.token_T.std() > 1e-3 * self.token_T.mean().abs())

    def aim(
        self, y_TH: torch.Tensor, added_TH: torch.Tensor, target_TH: torch.Tensor
    ) -> torch.Tensor:
        """Return the output, near `y`, of which the layer would make nearly the target.

        A norm divides all channels by what each of them becomes. One that would have to change
        much, because little of it reaches the residual stream, would so do harm to the others:
        its change is divided by 1 + r / 2, with the mean square r of the change over that of y.

        Args:
            y_TH: Outputs of the dense FFN.
            added_TH: What the layer makes of them.
            target_TH: What it should add to the residual stream.
        """
        tiny = torch.finfo(y_TH.dtype).tiny
        square_H, square_T = self.channel_H.square(), self.token_T.square()
        inverse_H = self.channel_H / (square_H + 1e-12 * square_H.max())
        inverse_T = self.token_T / (square_T + tiny)
        change_TH = (target_TH - added_TH) * inverse_H * inverse_T[:, None]
        if self.normalises:
            length_T1 = y_TH.square().mean(dim=1, keepdim=True).sqrt().clamp_min(tiny)
            change_TH /= 1 + (change_TH / length_T1).square().mean(dim=0) / 2
        return y_TH + change_TH
