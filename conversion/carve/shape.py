# SPDX-License-Identifier: Apache-2.0
"""The shape of a carved model: S, A and E, and the configuration that results from a dense one."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Self

from transformers import LlamaConfig, PreTrainedConfig

from cmoe_hf import CMoEConfig

from ..errors import RequestError
from ..source.architectures import NORMALISED, Architecture, llama_architecture
from ..source.checkpoint import Source
from .recipe import Recipe

FINEST = 48
"""The most experts to choose by default: twice as many are little better and much slower."""
QUANTISED_ROWS = 32
"""Rows of quantised numbers in llama.cpp are multiples of that long, of some types of 256."""
GROUPED_ROWS = 8
"""Rows of grouped products on GPUs start at multiples of 16 bytes."""
DEEP, VERY_DEEP, AMPLE = 12, 24, 0.6
"""From `DEEP` layers on the first one is worth its share of the budget as a dense one; from
`VERY_DEEP` on, with a budget above `AMPLE`, the first three and the last two."""


@dataclass(frozen=True)
class Shape:
    """How many experts there are and how many run, in the paper's notation for example `S3A3E8`.

    Raises `RequestError` if no model could have this shape.
    """

    shared: int
    """S: experts that always run, in the shared one."""
    active: int
    """A: routed experts run per token."""
    experts: int
    """E: S shared ones and E - S routed ones."""

    def __post_init__(self) -> None:
        """Refuse an impossible shape."""
        running, problem = self.shared + self.active, None
        if min(self.shared, self.active) < 0 or self.experts < 1:
            problem = "shared and active cannot be negative, and there must be at least one expert."
        elif running > self.experts:
            problem = (
                f"{self.shared} shared + {self.active} active = {running} experts, but there are "
                f"only {self.experts}. Lower --shared or --active, or raise --experts."
            )
        elif running == 0:
            problem = "it runs no neuron at all. Raise --shared or --active."
        elif self.shared == self.experts:
            problem = (
                "it leaves nothing to route: with every expert shared it is the dense model. "
                "Lower --shared."
            )
        if problem:
            raise RequestError(f"{self.notation} is impossible: {problem}")

    @classmethod
    def parse(cls, notation: str) -> Self:
        """Read the paper's notation. Raises `RequestError`."""
        found = re.fullmatch(r"S(\d+)A(\d+)E(\d+)", notation.strip())
        if found is None:
            raise RequestError(f"{notation!r} is not a shape such as S3A3E8.")
        return cls(*map(int, found.groups()))

    @classmethod
    def within(cls, budget: float, shared: int | None, experts: int) -> Self:
        """Return the shape that runs a share `budget` of the neurons, half of it shared by default.

        Raises `RequestError` if that is not a whole number of experts.
        """
        running = round(budget * experts) if 0 < budget < 1 else 0
        if not 0 < running < experts or abs(running - budget * experts) > 1e-6:
            fitting = ", ".join(f"{count / experts:g}" for count in range(1, min(experts, 33)))
            raise RequestError(
                f"--budget {budget:g} is not a whole number of {experts} experts. It can be "
                f"{fitting}; or change --experts."
            )
        shared = running // 2 if shared is None else shared
        if shared > running:
            raise RequestError(
                f"--shared {shared} is more than the {running} experts that --budget {budget:g} "
                "runs."
            )
        return cls(shared, running - shared, experts)

    @classmethod
    def spread(
        cls, budget: float, layers: int, width: int, dense: Collection[int] | None
    ) -> tuple[Self, tuple[int, ...]]:
        """Choose a shape, and the layers that stay dense if `dense` is None, for a model.

        At most a share `budget` of all neurons of `layers` FFNs of `width` runs, half of it shared.
        Raises `RequestError` if no shape can do that.
        """
        if dense is None:
            dense = (0,) if layers >= DEEP else ()
            if budget > AMPLE and layers >= VERY_DEEP:
                dense = (0, 1, 2, layers - 2, layers - 1)
        quantised, grouped = (
            max(numbers_that_fit(width, FINEST, rows), default=1)
            for rows in (QUANTISED_ROWS, GROUPED_ROWS)
        )
        experts, running = quantised if 2 * quantised >= FINEST else grouped, 0
        if 0 < budget < 1 and len(dense) < layers:
            rest = (budget * layers - len(dense)) / (layers - len(dense))
            running = int(rest * experts + 1e-6)
        if not 0 < running < experts:
            raise RequestError(
                f"--budget {budget:g} cannot be had in {layers} layers of {width} neurons of which "
                f"{len(dense)} stay dense: say --experts, --shared and --active."
            )
        active = -(-running // 2)
        return cls(running - active, active, experts), tuple(dense)

    @property
    def notation(self) -> str:
        """Return the shape in the paper's notation."""
        return f"S{self.shared}A{self.active}E{self.experts}"

    @property
    def activation_ratio(self) -> float:
        """Share of the FFN neurons that run."""
        return (self.shared + self.active) / self.experts


def carved_config(
    dense: PreTrainedConfig,
    arch: Architecture,
    shape: Shape,
    recipe: Recipe,
    *,
    dtype: str | None = None,
    dense_layers: Collection[int] = (),
) -> CMoEConfig:
    """Return the configuration of the carved model. Raises `RequestError` if that cannot be."""
    layers = dense.num_hidden_layers
    if wrong := [index for index in dense_layers if not 0 <= index < layers]:
        raise RequestError(f"there is no layer {wrong[0]}: the model has 0 to {layers - 1}.")
    if len(dense_layers) == layers:
        raise RequestError("with every layer dense it is the dense model: name fewer of them.")
    width = arch.ffn.width
    neurons, remainder = divmod(width, shape.experts)
    if remainder:
        fitting = [str(count) for count in range(2, min(width, 256) + 1) if width % count == 0]
        raise RequestError(
            f"the FFN width {width} is not divisible by {shape.experts} experts: neurons "
            f"would be lost. --experts can be {', '.join(fitting)}."
        )
    dropped = ("model_type", "architectures", "auto_map", "transformers_version")
    kept: dict[str, Any] = {
        key: value
        for key, value in dense.to_dict().items()
        if key not in dropped and not key.startswith("_")
    }
    kept |= {"dtype": dtype} if dtype else {}
    kept |= {"dense_layers": list(dense_layers)} if dense_layers else {}
    source_experts = picked = 1
    if arch.router is not None:
        check_hierarchical(recipe, dense_layers)
        source_experts, picked = dense.num_experts, dense.num_experts_per_tok
        kept |= {
            "num_parents": source_experts,
            "num_parents_per_tok": picked,
            "norm_parent_prob": kept.pop("norm_topk_prob", arch.model_type in NORMALISED),
            "flat_routing": recipe.competition == "token",
            "intermediate_size": width,
        }
        kept.pop("num_local_experts", None)  # the library's other name of the same
    kept |= {
        "architectures": [arch.cmoe_model.__name__],
        "ffn": arch.config_field,
        "num_experts": (shape.experts - shape.shared) * source_experts,
        "num_experts_per_tok": shape.active * picked,
        "moe_intermediate_size": neurons,
        "shared_expert_intermediate_size": shape.shared * neurons,
        "router_type": recipe.router,
        "router_absolute_score": recipe.absolute_score,
    }
    return arch.cmoe_config(**kept)


def check_hierarchical(recipe: Recipe, dense_layers: Collection[int]) -> None:
    """Raise `RequestError` for choices that do not exist where the source is a MoE."""
    if dense_layers:
        raise RequestError("the source is a MoE: its layers cannot stay dense.")
    if recipe.always_on or recipe.adaptive_split:
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


def source_expert_config(config: CMoEConfig, recipe: Recipe) -> CMoEConfig:
    """Return the configuration of one carved expert of a MoE, as if it were a dense FFN."""
    fields = ("hidden_size", "intermediate_size", "hidden_act")
    dense = LlamaConfig(num_attention_heads=1, **{name: getattr(config, name) for name in fields})
    routed = config.num_experts // config.num_parents
    active = config.num_experts_per_tok // config.num_parents_per_tok
    shape = Shape(config.num_shared, active, config.num_shared + routed)
    return carved_config(dense, llama_architecture(dense), shape, recipe)


def active_parameters(source: Source, config: CMoEConfig) -> int:
    """Return the number of parameters that run for a token."""
    ffn = source.ffn_parameters * config.num_hidden_layers
    run = config.num_parents_per_tok * config.activation_ratio
    return source.parameters - round(ffn * (config.num_parents - run))


def numbers_that_fit(width: int, most: int, rows: int) -> list[int]:
    """Return numbers of experts, 2 to `most`, whose widths are multiples of `rows`."""
    return [count for count in range(2, most + 1) if width % (rows * count) == 0]


def width_warning(config: CMoEConfig) -> str | None:
    """Return a warning if GPUs cannot run such experts fast, with numbers that avoid it."""
    width, neurons = config.ffn_width, config.moe_intermediate_size
    if neurons % GROUPED_ROWS == 0:
        return None
    experts = width // neurons
    fitting = numbers_that_fit(width, min(width, 512), GROUPED_ROWS)
    nearest = sorted(sorted(fitting, key=lambda count: abs(count - experts))[:3])
    instead = f" --experts {', '.join(map(str, nearest))} avoids it." if nearest else ""
    return (
        f"{experts} experts of {neurons} neurons, not a multiple of {GROUPED_ROWS}: the fast "
        f"grouped kernels of GPUs cannot run them, a slower loop will.{instead}"
    )


def engines_of_width(neurons: int) -> str:
    """Return in words which engines like experts of this width."""
    likes = {256: "Q4_K", QUANTISED_ROWS: "Q8_0 and Q4_0", GROUPED_ROWS: "grouped kernels"}
    found = [name for rows, name in likes.items() if neurons % rows == 0]
    return f"fits {', '.join(found)}" if found else "fits no grouped kernel"
