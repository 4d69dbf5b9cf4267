# SPDX-License-Identifier: Apache-2.0
"""The shape of a carved model: its configuration, and what speaks against it."""

from transformers import LlamaConfig, PreTrainedConfig

from cmoe_hf import CMoEConfig

from ..errors import RequestError
from ..source.architectures import ARCHITECTURES, Architecture
from .settings import Settings


def carved_config(dense: PreTrainedConfig, names: Architecture, settings: Settings) -> CMoEConfig:
    """Configuration of the carved model. Raises `RequestError` for a shape that does not fit."""
    width = getattr(dense, names.expert_width)
    neurons, remainder = divmod(width, settings.experts)
    if remainder:
        fitting = [str(count) for count in range(2, min(width, 256) + 1) if width % count == 0]
        raise RequestError(
            f"the FFN width {width} is not divisible by {settings.experts} experts: neurons "
            f"would be lost. --experts can be {', '.join(fitting)}."
        )
    if settings.k_act > width:
        raise RequestError(
            f"k_act is {settings.k_act}, but the FFN has only {width} neurons. Lower --k-act."
        )
    kept = {
        key: value
        for key, value in dense.to_dict().items()
        if key not in ("model_type", "architectures", "auto_map", "transformers_version")
        and not key.startswith("_")
    }
    if settings.dtype is not None:
        kept["dtype"] = settings.dtype
    parents = picked = 1
    if names.router is not None:
        parents, picked = dense.num_experts, dense.num_experts_per_tok
        check_hierarchical(settings)
        kept |= {
            "num_parents": parents,
            "num_parents_per_tok": picked,
            "norm_parent_prob": kept.pop("norm_topk_prob", False),
            "flat_routing": settings.choices.competition == "token",
            "intermediate_size": width,
        }
        kept.pop("num_local_experts", None)  # the library's other name of the same
    return names.cmoe_config(
        **kept
        | {
            "architectures": [names.cmoe_model.__name__],
            "num_experts": (settings.experts - settings.shared) * parents,
            "num_experts_per_tok": settings.active * picked,
            "moe_intermediate_size": neurons,
            "shared_expert_intermediate_size": settings.shared * neurons,
            "router_type": settings.choices.router,
            "router_absolute_score": settings.choices.absolute_score,
        }
    )


def check_hierarchical(settings: Settings) -> None:
    """Raises `RequestError` for choices that a MoE as the source does not have."""
    recipe = settings.choices
    if recipe.pinned or recipe.adaptive_split:
        raise RequestError(
            "a budget chooses among the experts of a dense FFN; the source is a MoE. Say --shared "
            "and --active."
        )
    if recipe.competition == "token" and recipe.router != "linear":
        raise RequestError(
            "the source is a MoE, and experts of all parents of a token can only be compared by a "
            "linear router: change competition and router both, or neither."
        )
    if recipe.routed_by != "router":
        raise RequestError(f"a MoE cannot be calibrated with routed_by {recipe.routed_by!r}.")


def parent_config(config: CMoEConfig, settings: Settings) -> CMoEConfig:
    """Configuration of one carved parent of a hierarchical model, as if it were a dense FFN."""
    dense = LlamaConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        hidden_act=config.hidden_act,
    )
    return carved_config(dense, ARCHITECTURES["llama"], settings)


def width_warning(config: CMoEConfig) -> str | None:
    """What speaks against the width of the experts, and how many experts would avoid it.

    A grouped product on a GPU wants rows that start at multiples of 16 bytes: 8 neurons in 16 bits.
    """
    width, neurons = config.intermediate_size, config.moe_intermediate_size
    if neurons % 8 == 0:
        return None
    experts = width // neurons
    fitting = [count for count in range(2, min(width, 512) + 1) if width % (8 * count) == 0]
    nearest = sorted(sorted(fitting, key=lambda count: abs(count - experts))[:3])
    instead = f" --experts {', '.join(map(str, nearest))} avoids it." if nearest else ""
    return (
        f"{experts} experts of {neurons} neurons, not a multiple of 8: the fast grouped kernels of "
        f"GPUs cannot run them, a slower loop will.{instead}"
    )
