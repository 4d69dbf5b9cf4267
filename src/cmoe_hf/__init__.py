# SPDX-License-Identifier: Apache-2.0
"""CMoE models for transformers: importing this package registers them with the Auto classes."""

from .configuration_cmoe import CMoEConfig, CMoEHierarchicalConfig
from .families import carved_classes

FAMILIES = tuple(
    carved_classes(model_type)
    for model_type in ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "qwen3_moe", "olmoe")
)
"""Classes that importing the package makes; `carved_classes` makes those of other families."""

globals().update({kind.__name__: kind for classes in FAMILIES for kind in classes})

__version__ = "0.3.0"

__all__ = [
    "FAMILIES",
    "CMoEConfig",
    "CMoEHierarchicalConfig",
    "__version__",
    "carved_classes",
]
