# SPDX-License-Identifier: Apache-2.0
"""CMoE models for transformers: importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_cmoe import (
    CMoEConfig,
    CMoEGPTNeoXConfig,
    CMoEHierarchicalConfig,
    CMoELlamaConfig,
    CMoEMistralConfig,
    CMoEOlmoeConfig,
    CMoEQwen2Config,
    CMoEQwen3Config,
    CMoEQwen3MoeConfig,
)
from .modeling_cmoe import (
    CMoEGPTNeoXForCausalLM,
    CMoEGPTNeoXModel,
    CMoELlamaForCausalLM,
    CMoELlamaModel,
    CMoEMistralForCausalLM,
    CMoEMistralModel,
    CMoEOlmoeForCausalLM,
    CMoEOlmoeModel,
    CMoEQwen2ForCausalLM,
    CMoEQwen2Model,
    CMoEQwen3ForCausalLM,
    CMoEQwen3Model,
    CMoEQwen3MoeForCausalLM,
    CMoEQwen3MoeModel,
)

FAMILIES = (
    (CMoELlamaConfig, CMoELlamaModel, CMoELlamaForCausalLM),
    (CMoEMistralConfig, CMoEMistralModel, CMoEMistralForCausalLM),
    (CMoEQwen2Config, CMoEQwen2Model, CMoEQwen2ForCausalLM),
    (CMoEQwen3Config, CMoEQwen3Model, CMoEQwen3ForCausalLM),
    (CMoEGPTNeoXConfig, CMoEGPTNeoXModel, CMoEGPTNeoXForCausalLM),
    (CMoEQwen3MoeConfig, CMoEQwen3MoeModel, CMoEQwen3MoeForCausalLM),
    (CMoEOlmoeConfig, CMoEOlmoeModel, CMoEOlmoeForCausalLM),
)

for config, decoder, causal in FAMILIES:
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, decoder, exist_ok=True)
    AutoModelForCausalLM.register(config, causal, exist_ok=True)
    # Without these, a model that is loaded and saved again would leave the Python files behind.
    config.register_for_auto_class("AutoConfig")
    decoder.register_for_auto_class("AutoModel")
    causal.register_for_auto_class("AutoModelForCausalLM")

__version__ = "0.2.0"

__all__ = [
    "FAMILIES",
    "CMoEConfig",
    "CMoEGPTNeoXConfig",
    "CMoEGPTNeoXForCausalLM",
    "CMoEGPTNeoXModel",
    "CMoEHierarchicalConfig",
    "CMoELlamaConfig",
    "CMoELlamaForCausalLM",
    "CMoELlamaModel",
    "CMoEMistralConfig",
    "CMoEMistralForCausalLM",
    "CMoEMistralModel",
    "CMoEOlmoeConfig",
    "CMoEOlmoeForCausalLM",
    "CMoEOlmoeModel",
    "CMoEQwen2Config",
    "CMoEQwen2ForCausalLM",
    "CMoEQwen2Model",
    "CMoEQwen3Config",
    "CMoEQwen3ForCausalLM",
    "CMoEQwen3Model",
    "CMoEQwen3MoeConfig",
    "CMoEQwen3MoeForCausalLM",
    "CMoEQwen3MoeModel",
    "__version__",
]
