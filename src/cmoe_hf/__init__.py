# SPDX-License-Identifier: Apache-2.0
"""CMoE models for transformers: importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_cmoe import CMoELlamaConfig
from .modeling_cmoe import CMoELlamaForCausalLM, CMoELlamaModel, CMoELlamaPreTrainedModel

AutoConfig.register(CMoELlamaConfig.model_type, CMoELlamaConfig, exist_ok=True)
AutoModel.register(CMoELlamaConfig, CMoELlamaModel, exist_ok=True)
AutoModelForCausalLM.register(CMoELlamaConfig, CMoELlamaForCausalLM, exist_ok=True)

# Without these, a model that is loaded and saved again would leave the Python files behind.
CMoELlamaConfig.register_for_auto_class("AutoConfig")
CMoELlamaModel.register_for_auto_class("AutoModel")
CMoELlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__version__ = "0.1.0"

__all__ = [
    "CMoELlamaConfig",
    "CMoELlamaForCausalLM",
    "CMoELlamaModel",
    "CMoELlamaPreTrainedModel",
    "__version__",
]
