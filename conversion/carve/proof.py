# SPDX-License-Identifier: Apache-2.0
"""Compare each carved layer with the dense one, in the class that the repository will have.

Shape suffixes: B windows, L tokens of one window, H hidden size.
"""

import torch

from cmoe_hf import CMoEConfig

from ..errors import CMoEError
from ..source.architectures import Architecture
from ..source.ffn import TOLERANCE, difference
from ..source.library import meta_model
from ..source.walk import LayerWalk


class AllActive:
    """The carved family's own layers with all experts running, which is what the dense ones do."""

    def __init__(self, arch: Architecture, config: CMoEConfig, layers: LayerWalk) -> None:
        fields = {"num_experts_per_tok": config.num_experts, "always_on_experts": None}
        whole = type(config).from_dict(config.to_dict() | fields)
        self.layers = LayerWalk(meta_model(arch.cmoe_model, whole), layers.device)
        self.layers.calls = layers.calls
        is_scaled = arch.ffn.gate_scale * arch.ffn.scale != 1
        self.tolerance = 0.02 if is_scaled else TOLERANCE  # folded scales round the weights

    def check(
        self,
        index: int,
        tensors: dict[str, torch.Tensor],
        entering_BLH: torch.Tensor,
        leaving_BLH: torch.Tensor,
    ) -> None:
        """Raise `CMoEError` unless a layer with these tensors computes what the dense one did."""
        device = self.layers.device
        self.layers.load(
            index, {name: it.to(device, torch.float32) for name, it in tensors.items()}
        )
        found_BLH = self.layers(entering_BLH)
        self.layers.release()
        if (error := difference(found_BLH, leaving_BLH)) > self.tolerance:
            raise CMoEError(
                f"layer {index} with all experts active differs from the dense one by {error:.2g}: "
                "a carved model of this family would not compute the same. Please report it."
            )
