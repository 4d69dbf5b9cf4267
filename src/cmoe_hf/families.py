# SPDX-License-Identifier: Apache-2.0
"""The classes of carved families: literal ones beside the weights, the same ones made on demand."""

import re
from functools import wraps
from pathlib import Path
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from . import configuration_cmoe, modeling_cmoe
from .configuration_cmoe import CMoEConfig

CONFIGURATION = '''

from {config.__module__} import {config.__name__}


@strict
class CMoE{family}Config({base}, {config.__name__}):
    """Configuration of a carved {family}."""

    model_type = "cmoe_{config.model_type}"
'''
MODEL = '''

from {decoder.__module__} import {decoder.__name__}
from {causal.__module__} import {causal.__name__}

from .configuration_cmoe import CMoE{family}Config


class CMoE{family}Model(Carved, {decoder.__name__}):
    """A carved {family} without a head."""

    config: CMoE{family}Config


class CMoE{family}ForCausalLM(Carved, {causal.__name__}):
    """A carved {family}."""

    config: CMoE{family}Config
    model_class = CMoE{family}Model
'''
CODE = {"configuration_cmoe.py": CONFIGURATION, "modeling_cmoe.py": MODEL, "triton_cmoe.py": ""}
"""Python files of a repository, and how the classes of a family are written at their ends."""
NAMES_BEFORE = {
    "cmoe_gpt_neox": {
        r"^model\.embed_tokens\.": "gpt_neox.embed_in.",
        r"^model\.norm\.": "gpt_neox.final_layer_norm.",
        r"^model\.": "gpt_neox.",
    }
}
"""Names of tensors in repositories of cmoe-hf 0.2 and before, and those of the library."""
MOE_FAMILIES = ("mixtral", "olmoe", "qwen3_moe")
"""MoEs whose experts can be carved."""
Classes = tuple[type[CMoEConfig], type[PreTrainedModel], type[PreTrainedModel]]
"""Configuration, decoder and causal model."""


def current_name(model_type: str, name: str) -> str:
    """Return what a tensor of a carved model is called today."""
    rules = NAMES_BEFORE.get(model_type, {}).items()
    found = next((rule for rule in rules if re.match(rule[0], name)), None)
    return name if found is None else re.sub(*found, name)


def family_code(dense: type[PreTrainedConfig]) -> dict[str, str]:
    """Return the literal classes of a carved family, by the name of the file that they end.

    Args:
        dense: Configuration class of the dense family.
    """
    is_moe = dense.model_type in MOE_FAMILIES
    names = {
        "config": dense,
        "decoder": MODEL_MAPPING[dense],
        "causal": MODEL_FOR_CAUSAL_LM_MAPPING[dense],
        "family": dense.__name__.removesuffix("Config"),
        "base": "CMoEHierarchicalConfig" if is_moe else "CMoEConfig",
    }
    return {name: code.format(**names) for name, code in CODE.items()}


def carved_classes(model_type: str) -> Classes:
    """Return the classes of a carved family, registered with the Auto classes.

    Args:
        model_type: Of the dense family, for example `"gemma3_text"`, or of the carved one.

    Raises:
        KeyError: transformers has no such causal model.
    """
    dense = CONFIG_MAPPING[model_type.removeprefix("cmoe_")]
    family = dense.__name__.removesuffix("Config")
    name = f"CMoE{family}Config"
    if not hasattr(configuration_cmoe, name):
        code = family_code(dense)
        for module in (configuration_cmoe, modeling_cmoe):
            written = code[Path(str(module.__file__)).name]
            exec(compile(written, f"<{family}>", "exec"), vars(module))
        renamed = NAMES_BEFORE.get(f"cmoe_{dense.model_type}", {})
        rules: list[Any] = [WeightRenaming(before, now) for before, now in renamed.items()]
        if rules:
            register_checkpoint_conversion_mapping(f"cmoe_{dense.model_type}", rules)
    config = getattr(configuration_cmoe, name)
    decoder = getattr(modeling_cmoe, f"CMoE{family}Model")
    causal = getattr(modeling_cmoe, f"CMoE{family}ForCausalLM")
    AutoConfig.register(config.model_type, config, exist_ok=True)
    for auto, model in ((AutoModel, decoder), (AutoModelForCausalLM, causal)):
        auto.register(config, model, exist_ok=True)
        if "save_pretrained" not in vars(model):
            model.save_pretrained = with_our_names(model.save_pretrained)
    if "save_pretrained" not in vars(config):  # a model's calls it, before it uploads anything
        config.save_pretrained = with_code(config.save_pretrained)
    return config, decoder, causal


def repository_code(config: type[PreTrainedConfig]) -> dict[str, str]:
    """Return the Python files that models of a family need beside their weights, by name."""
    dense = next(
        base for base in config.__mro__ if base.__module__.startswith("transformers.models")
    )
    ends = family_code(dense).items()
    return {name: (Path(__file__).parent / name).read_text("utf-8") + end for name, end in ends}


def with_code(save: Any) -> Any:
    """Let `save_pretrained` of a configuration write the Python files, too."""

    @wraps(save)
    def wrapper(self: PreTrainedConfig, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        save(self, save_directory, *args, **kwargs)
        for name, text in repository_code(type(self)).items():
            Path(save_directory, name).write_text(text, encoding="utf-8")

    return wrapper


def with_our_names(save: Any) -> Any:
    """Let `save_pretrained` of a model write the names that its class reads."""

    @wraps(save)
    def wrapper(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **{"save_original_format": False} | kwargs)

    return wrapper
