# SPDX-License-Identifier: Apache-2.0
"""The verb `convert`: a dense checkpoint in, a complete CMoE repository out."""

import hashlib
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

import cmoe_hf
from cmoe_hf import CMoELlamaConfig

from .calibration import load_text, random_windows, tokenize
from .card import model_card
from .checkpoint import LEGAL_FILES, Source, Target, load_tokenizer, open_source
from .device import DTYPES, check_dtype, find_device, peak_memory_bytes
from .errors import RequestError
from .pipeline import carve_model
from .recipe import RECIPES, Recipe

CALIBRATION_TOKENS = 16_384
"""The paper's amount: 8 windows of 2,048 tokens."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that determines the result; recorded in `conversion.json`."""

    shared: int
    """Shared units S."""
    active: int
    """Routed experts run per token, A."""
    experts: int
    """Units in all, E: S shared ones and E - S routed experts."""
    budget: float | None = None
    """Share of the FFN neurons to run, if that was asked for instead of S and A."""
    recipe: str = "refined"
    """One of `recipe.RECIPES`."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of the recipe that differ from it, for ablations."""
    calibration: str = "wikitext2"
    """Text file or data set, see `calibration.load_text`."""
    samples: int | None = None
    """Calibration windows; by default as many as make 16,384 tokens."""
    sequence_length: int | None = None
    """Tokens of a window; by default 2,048, or the model's context if that is shorter."""
    k_act: int = 10
    """Neurons marked per token, K_a."""
    seed: int = 0
    """Of the windows' offsets; nothing else is random."""
    dtype: str | None = None
    """Precision of the carved weights; by default that of the source."""

    def __post_init__(self) -> None:
        """Refuse what no model could satisfy. Raises `RequestError`."""
        if self.shared < 0 or self.active < 0 or self.experts < 1:
            raise RequestError(
                f"S={self.shared}, A={self.active}, E={self.experts}: shared and active cannot "
                "be negative, and there must be at least one expert."
            )
        if self.shared + self.active > self.experts:
            raise RequestError(
                f"{self.notation} asks for {self.shared} shared + {self.active} active = "
                f"{self.shared + self.active} experts, but there are only {self.experts}. "
                "Lower --shared or --active, or raise --experts."
            )
        if self.shared + self.active == 0:
            raise RequestError(
                f"{self.notation} runs no neuron at all. Raise --shared or --active."
            )
        if self.shared == self.experts:
            raise RequestError(
                f"{self.notation} leaves nothing to route: with every expert shared it is the "
                "dense model. Lower --shared."
            )
        if self.recipe not in RECIPES:
            raise RequestError(
                f"there is no recipe {self.recipe!r}; choose one of {', '.join(RECIPES)}."
            )
        known = {choice.name for choice in fields(Recipe)}
        unknown = sorted(self.changes.keys() - known)
        if unknown:
            raise RequestError(
                f"a recipe has no choice {', '.join(unknown)}; it has {', '.join(sorted(known))}."
            )
        limit = min(self.active, self.experts - self.shared - 1)
        if self.choices.pinned > limit:  # also refuses a choice that does not exist
            raise RequestError(
                f"the recipe's pinned is {self.choices.pinned}; at {self.notation} it can be at "
                f"most {limit}: no more than are active, and one must be left to route."
            )
        check_dtype(self.dtype)
        for name in ("samples", "sequence_length", "k_act"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name} is {value}; it must be at least 1.")

    @property
    def choices(self) -> Recipe:
        """The recipe with the changes."""
        return replace(RECIPES[self.recipe], **self.changes)

    @property
    def notation(self) -> str:
        """The paper's name of the shape, for example `S3A3E8`."""
        return f"S{self.shared}A{self.active}E{self.experts}"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion did; the keys of `cmoe convert --json`."""

    output: str
    notation: str
    activation_ratio: float
    calibration_tokens: int
    seconds: float
    peak_memory_bytes: int
    relative_output_error: float
    """Mean over the layers, on the calibration tokens."""
    carving_ratio: float
    """Time of the carving pass over that of the bare forward pass."""


def convert(
    model: str | Path,
    output: str | Path,
    *,
    experts: int,
    shared: int | None = None,
    active: int | None = None,
    budget: float | None = None,
    recipe: str = "refined",
    changes: Mapping[str, Any] | None = None,
    calibration: str | Path = "wikitext2",
    samples: int | None = None,
    sequence_length: int | None = None,
    k_act: int = 10,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Carve the dense model `model` (folder or Hub id) into a CMoE repository at `output`.

    Args:
        model: Folder or Hub id of a supported dense model, with tokenizer and safetensors.
        output: Folder to create. It appears only when it is complete.
        shared, active, experts: S, A and E of the paper's notation SxAyEz.
        budget: Share of the FFN neurons to run, instead of `active`. Each layer then decides on
            held-out calibration tokens how many of the active experts always run.
        recipe: `"refined"`, `"paper"` or `"released"`, see `recipe.RECIPES`.
        changes: Fields of the recipe to change, for example `{"refit": False}`.
        calibration: Text file, `wikitext2`, `c4` or a Hub data set, see `calibration.load_text`.
        samples, sequence_length: Number and length in tokens of the calibration windows.
        k_act: Neurons marked per token (K_a).
        seed: Seed of the windows' random offsets.
        dtype: Precision of the carved weights, default that of the source.
        device: Where to compute, default the accelerator if there is one.
        revision: Branch, tag or commit of a Hub model.
        overwrite: Replace an existing model repository at `output`.

    Returns:
        What was done, with times in seconds and memory in bytes.

    Raises:
        RequestError: The request cannot be satisfied; nothing was started.
        CMoEError: The work failed; nothing was left at `output`.
    """
    start = time.perf_counter()
    shared, active = units(shared, active, experts, budget)
    settings = Settings(
        shared=shared,
        active=active,
        experts=experts,
        budget=budget,
        recipe=recipe,
        changes=({"adaptive_split": True} if budget is not None else {}) | dict(changes or {}),
        calibration=str(calibration),
        samples=samples,
        sequence_length=sequence_length,
        k_act=k_act,
        seed=seed,
        dtype=dtype,
    )
    torch_device = find_device(device)
    source = open_source(model, revision=revision)
    config = carved_config(source, settings)
    target = Target(output, layers=config.num_hidden_layers, overwrite=overwrite)
    target.check(source, DTYPES[settings.dtype] if settings.dtype else None)
    tokenizer = load_tokenizer(source.folder)
    windows_WL, text_record = calibration_windows(settings, source, tokenizer)
    source.check_values()

    layers: list[dict[str, Any]] = []
    with target:
        for number, tensors, figures in carve_model(
            source,
            windows_WL,
            config,
            settings.choices,
            k_act=settings.k_act,
            device=torch_device,
        ):
            target.write_shard(number, in_dtype(tensors, settings.dtype))
            layers += [figures] if figures else []
        write_loading_files(target, source, config, tokenizer)
        result = Conversion(
            output=str(target.output),
            notation=settings.notation,
            activation_ratio=config.activation_ratio,
            calibration_tokens=windows_WL.numel(),
            seconds=time.perf_counter() - start,
            peak_memory_bytes=peak_memory_bytes(torch_device),
            **summary(layers),
        )
        report = conversion_report(source, settings, text_record, result, layers, torch_device)
        target.write_json("conversion.json", report)
        target.write_text("README.md", model_card(source, config, report))
    return result


def units(
    shared: int | None, active: int | None, experts: int, budget: float | None
) -> tuple[int, int]:
    """S and A, as asked for or from a budget. Raises `RequestError` if that is not possible."""
    if budget is None:
        if shared is None or active is None:
            raise RequestError("say how much of the FFN runs: --shared and --active, or --budget.")
        return shared, active
    if active is not None:
        raise RequestError("--budget decides how many experts are active: leave out --active.")
    running = round(budget * experts) if 0 < budget < 1 else 0
    if not 0 < running < experts or abs(running - budget * experts) > 1e-6:
        fitting = ", ".join(f"{count / experts:g}" for count in range(1, min(experts, 33)))
        raise RequestError(
            f"--budget {budget:g} is not a whole number of {experts} experts. It can be {fitting}; "
            "or change --experts."
        )
    shared = running // 2 if shared is None else shared
    if shared > running:
        raise RequestError(
            f"--shared {shared} is more than the {running} experts that --budget {budget:g} runs."
        )
    return shared, running - shared


def write_loading_files(
    target: Target, source: Source, config: CMoELlamaConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Everything beside the weights that a loader needs, and the source's legal files."""
    target.write_index()
    config.save_pretrained(target.folder)
    target.copy_code()
    tokenizer.save_pretrained(target.folder)
    if (source.folder / GENERATION_CONFIG_NAME).is_file():
        target.copy_from(source, GENERATION_CONFIG_NAME)
    else:
        GenerationConfig.from_model_config(source.config).save_pretrained(target.folder)
    target.copy_from(source, *LEGAL_FILES)


def summary(layers: list[dict[str, Any]]) -> dict[str, float]:
    """The figures of all layers as those of the whole model."""
    errors = [layer["relative_output_error"] for layer in layers]
    bare = sum(layer["seconds"]["bare_forward"] for layer in layers)
    carving = sum(layer["seconds"]["carving_pass"] for layer in layers)
    return {"relative_output_error": sum(errors) / len(errors), "carving_ratio": carving / bare}


def carved_config(source: Source, settings: Settings) -> CMoELlamaConfig:
    """Configuration of the carved model. Raises `RequestError` for a shape that does not fit."""
    dense = source.config
    width = dense.intermediate_size
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
    return source.architecture.cmoe_config(
        **kept,
        architectures=[source.architecture.cmoe_model.__name__],
        num_experts=settings.experts - settings.shared,
        num_experts_per_tok=settings.active,
        moe_intermediate_size=neurons,
        shared_expert_intermediate_size=settings.shared * neurons,
        router_type=settings.choices.router,
        router_absolute_score=settings.choices.absolute_score,
    )


def calibration_windows(
    settings: Settings, source: Source, tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The calibration windows (W, L) and a record of the text that names no path."""
    context = source.config.max_position_embeddings
    length = settings.sequence_length or min(2048, context)
    if length > context:
        raise RequestError(
            f"--sequence-length {length} is longer than the model's context of {context} tokens."
        )
    samples = settings.samples or max(1, CALIBRATION_TOKENS // length)
    text = load_text(settings.calibration)
    ids = tokenize(tokenizer, text)
    windows_WL = random_windows(ids, samples=samples, length=length, seed=settings.seed)
    if windows_WL.max() >= source.config.vocab_size:
        raise RequestError(
            f"the tokenizer gives token {int(windows_WL.max())}, but the model's vocabulary has "
            f"{source.config.vocab_size}: it is the tokenizer of another model."
        )
    name = settings.calibration
    return windows_WL, {
        "source": Path(name).name if Path(name).expanduser().is_file() else name,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "text_tokens": len(ids),
        "samples": samples,
        "sequence_length": length,
        "tokens": windows_WL.numel(),
    }


def in_dtype(tensors: dict[str, torch.Tensor], dtype: str | None) -> dict[str, torch.Tensor]:
    """The tensors in the precision asked for; the balance bias is always float32."""
    if dtype is None:
        return tensors
    return {
        name: tensor if name.endswith("balance_bias") else tensor.to(DTYPES[dtype])
        for name, tensor in tensors.items()
    }


def conversion_report(
    source: Source,
    settings: Settings,
    calibration: dict[str, Any],
    result: Conversion,
    layers: list[dict[str, Any]],
    device: torch.device,
) -> dict[str, Any]:
    """The content of `conversion.json`: no path, user name or token reaches it."""
    figures = asdict(result)
    del figures["output"]
    return {
        "source": {"name": source.name, "revision": source.revision},
        "settings": {**asdict(settings), "calibration": calibration["source"]},
        "recipe": asdict(settings.choices),
        "calibration": calibration,
        "versions": {
            "cmoe_hf": cmoe_hf.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": device.type,
        "result": figures,
        "layers": layers,
    }
