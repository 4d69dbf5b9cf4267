# SPDX-License-Identifier: Apache-2.0
"""Plan a conversion: find out, and refuse, everything that can be known beforehand."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedTokenizerBase

from cmoe_hf import CMoEConfig
from cmoe_hf.families import repository_code

from .carve.decoder import BATCH_TOKENS, PROFILED_TOKENS
from .carve.partition import CLUSTERING_TOKENS
from .carve.recipe import Recipe
from .carve.refit import RIDGES
from .carve.settings import CALIBRATION_TOKENS, ConvertOptions, Settings
from .carve.shape import Shape, active_parameters, carved_config, width_warning
from .device import DTYPES, best_seconds, find_device, free_memory
from .errors import RequestError
from .folder.auxiliary_files import AuxiliaryFiles, read_auxiliary_files
from .folder.layerwise import WorkFolder
from .folder.own_text import cached_values, own_batches
from .folder.paths import existing_parent
from .folder.unfinished import PartialFolder
from .options import narrowed, with_options
from .source.architectures import TESTED
from .source.calibration import (
    CHARACTERS_PER_TOKEN,
    WHOLE_CHARACTERS,
    apart_windows,
    held_out,
    random_windows,
    read_tokens,
)
from .source.checkpoint import Source, open_source
from .source.hub import load_tokenizer
from .source.loading import window_length
from .source.texts import OWN, open_text, text_file

CPU_READS = 25e9
"""Bytes that a CPU of two memory channels reads in a second."""
ROUTING_SECONDS, EXPERT_SECONDS = 1e-4, 3e-5
"""What a layer's routing takes, and what each expert that runs adds: measured, results/speed."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a conversion will make and need; the keys of `cmoe convert --dry-run --json`."""

    output: str
    notation: str
    layers: int
    hidden_size: int
    ffn_width: int
    expert_width: int
    """Neurons of one expert."""
    routed_experts: int
    parameters: int
    """Of the dense model. The carved one has a router more."""
    active_parameters: int
    """Run for a token, embedding and head included."""
    activation_ratio: float
    speedup_bound: float
    """Most that one sequence can be decoded faster: weights read for a token, dense over carved."""
    speedup_expected: float
    """On a CPU, including the time to choose and call experts."""
    calibration_tokens: int
    refit_order: int | None
    """Order of the linear system of a layer's refit at most; None without one."""
    device: str
    activations: str
    """Where the calibration activations will be kept."""
    disk_bytes: int
    """Of the finished repository."""
    work_bytes: int
    """Needed beside it while the conversion runs."""
    disk_free_bytes: int
    peak_memory_bytes: int
    memory_available_bytes: int
    seconds: float
    """A guess; the progress bar knows better after the first layer."""
    warnings: list[str]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a conversion needs, found and checked."""

    settings: Settings
    """With their open choices decided: the commit, and where activations are kept."""
    recipe: Recipe
    source: Source
    config: CMoEConfig
    """Of the carved model."""
    tokenizer: PreTrainedTokenizerBase
    windows_WL: torch.Tensor
    """On the meta device until the dense model has written them."""
    calibration: dict[str, Any]
    """A record of the calibration text that names no path."""
    device: torch.device
    auxiliary: AuxiliaryFiles
    """Files that the carved model takes over from the source."""

    @property
    def read(self) -> dict[str, str | Path | None]:
        """Return the paths that are read, by what messages call them."""
        return {
            "the source checkpoint": self.source.folder,
            "the calibration text": text_file(self.settings.calibration),
        }


@with_options(ConvertOptions)
def plan(options: ConvertOptions) -> Plan:
    """Say what `convert` with the same arguments would do, or refuse what it would refuse.

    Nothing is written. A Hub model is downloaded, as the conversion will need it.

    Raises:
        RequestError: The request cannot be satisfied.
        CMoEError: The source checkpoint is damaged or cannot be reached.
    """
    settings = narrowed(options, Settings)
    prepared, work = prepare_work(options.model, options.output, settings)
    prepared.source.digest()
    return estimate(prepared, work)


def prepare_work(
    model: str | Path, output: str | Path, settings: Settings
) -> tuple[Prepared, WorkFolder]:
    """Prepare a conversion and the folder to write to, without writing. Raises `RequestError`."""
    work = WorkFolder(output, overwrite=settings.overwrite)
    prepared = prepare(model, settings)
    work.check(prepared.read)
    if (needed := own_text_bytes(prepared)) > (free := free_memory(prepared.device)):
        raise RequestError(
            "the dense model needs all of its weights in memory to write the calibration text: "
            f"about {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free. Name another "
            "--calibration."
        )
    check_disk(work, disk_bytes(prepared) + work_bytes(prepared))
    return prepared, work


def prepare(
    model: str | Path, settings: Settings, kept: tuple[torch.Tensor, dict[str, Any]] | None = None
) -> Prepared:
    """Find and check all that a conversion needs, cheapest first. Raises `RequestError`.

    `kept` is a former result of `calibration_windows`, used instead of reading the text again.
    """
    device = find_device(settings.device)
    trusted, recipe = settings.trust_remote_code, Recipe.of(settings.recipe)
    source = open_source(model, revision=settings.revision, trust_remote_code=trusted)
    config, _ = carved_as(source, settings)
    if settings.k_act > config.ffn_width:
        raise RequestError(
            f"k_act is {settings.k_act}, but the FFN has only {config.ffn_width} neurons. "
            "Lower --k-act."
        )
    tokenizer = load_tokenizer(source.folder, trust_remote_code=trusted)
    # Before anything is tokenised: a tokenizer forgets its truncation and padding over that.
    files = read_auxiliary_files(source.folder).beside(config, tokenizer)
    windows_WL, calibration = kept or calibration_windows(settings, source, tokenizer)
    prepared = Prepared(
        settings=replace(settings, revision=source.revision),
        recipe=recipe,
        source=source,
        config=config,
        tokenizer=tokenizer,
        windows_WL=windows_WL,
        calibration=calibration,
        device=device,
        auxiliary=files,
    )
    place = settings.activations
    if place == "auto":
        most = 0.9 * psutil.virtual_memory().available
        fits = device.type != "cpu" or memory_bytes(prepared, on_disk=False) < most
        place = "memory" if fits else "disk"
    return replace(prepared, settings=replace(prepared.settings, activations=place))


def carved_as(source: Source, settings: Settings) -> tuple[CMoEConfig, Shape]:
    """Return configuration and shape of the carved model. Raises `RequestError`."""
    arch, dense = source.architecture, source.config
    shape, dense_layers = settings.shape_for(dense.num_hidden_layers, arch.ffn.width)
    recipe, dtype = Recipe.of(settings.recipe), settings.dtype
    config = carved_config(dense, arch, shape, recipe, dtype=dtype, dense_layers=dense_layers)
    return config, shape


def calibration_windows(
    settings: Settings, source: Source, tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the calibration windows (W, L) and a record of the text that names no path.

    They are drawn from a prefix of a text that has more than `WHOLE_CHARACTERS`, and more than is
    needed for enough tokens: the record says so.
    """
    length = window_length(source.config, settings.sequence_length)
    own, tokens = settings.own_text, CALIBRATION_TOKENS
    tokens = own.tokens if own is not None and own.tokens is not None else tokens
    samples = settings.samples or max(1, tokens // length)
    if own is not None:
        windows_WL = torch.empty(samples, length, dtype=torch.int64, device="meta")
        return windows_WL, calibration_record(windows_WL, source=OWN, text_is_whole=True)
    text = open_text(settings.calibration)
    most = max(WHOLE_CHARACTERS, CHARACTERS_PER_TOKEN * samples * length)
    read = read_tokens(text, tokenizer, source.config.vocab_size, most_characters=most)
    holds_out = Recipe.of(settings.recipe).held_out_ridge and source.architecture.router is None
    draw = apart_windows if holds_out else random_windows
    windows_WL = draw(read.ids, samples=samples, length=length, seed=settings.seed)
    return windows_WL, calibration_record(
        windows_WL,
        source=text.name,
        sha256=read.sha256,
        text_tokens=len(read.ids),
        text_characters=read.characters,
        text_is_whole=read.is_whole,
    )


def calibration_record(windows_WL: torch.Tensor, **text: Any) -> dict[str, Any]:
    """Return the entry of `conversion.json` about the calibration windows and their text."""
    samples, length = windows_WL.shape
    return {**text, "samples": samples, "sequence_length": length, "tokens": windows_WL.numel()}


def free_disk(work: PartialFolder) -> tuple[Path, int]:
    """Return the nearest existing folder above the output, and the bytes free there."""
    parent = existing_parent(work.output)
    return parent, shutil.disk_usage(parent).free


def check_disk(work: PartialFolder, needed: float) -> None:
    """Raise `RequestError` if so many bytes would not fit on the disk of the output."""
    place, free = free_disk(work)
    if free < needed:
        raise RequestError(
            f"the {work.noun} needs about {needed / 1e9:.1f} GB of disk, but {place} has "
            f"{free / 1e9:.1f} GB free. Free some space or choose another disk."
        )


def disk_bytes(prepared: Prepared) -> int:
    """Estimate the size of the finished repository."""
    source, config = prepared.source, prepared.config
    dtype = DTYPES[prepared.settings.dtype] if prepared.settings.dtype else None
    rows = 1 if config.router_type == "linear" else 2
    router = config.num_experts * (rows * config.hidden_size + 1) * 4
    code = sum(map(len, repository_code(type(config)).values()))
    per_layer = router + 14 * 120 + 4_000  # headers, index, and figures in conversion.json
    small = code + prepared.auxiliary.nbytes + 8_000
    return source.nbytes(dtype) + config.num_hidden_layers * per_layer + small


def work_bytes(prepared: Prepared) -> int:
    """Bound the working files: hidden states before two layers, and activations on the disk."""
    config, on_disk = prepared.config, prepared.settings.activations == "disk"
    states = 4 * config.hidden_size  # two layers, in carved and dense stream
    kept = (3 if prepared.source.architecture.ffn.adds else 4) * config.hidden_size
    kept += config.ffn_width
    return 4 * prepared.windows_WL.numel() * (states + kept * on_disk)


def own_text_bytes(prepared: Prepared) -> int:
    """Estimate the memory in which the dense model writes the calibration text, if it does."""
    if not prepared.windows_WL.is_meta:
        return 0
    source = prepared.source
    shape, stored = prepared.windows_WL.shape, source.nbytes(None)
    batches = own_batches(source.config, prepared.tokenizer, prepared.device, *shape)
    values = max(batches) * shape[1] * cached_values(source.config)
    return stored + values * round(stored / source.parameters)


def memory_bytes(prepared: Prepared, on_disk: bool) -> int:
    """Bound the memory: a layer, activations kept and the greediest step, or what is outside."""
    source, config, recipe = prepared.source, prepared.config, prepared.recipe
    hidden, width = config.hidden_size, config.ffn_width
    tokens = prepared.windows_WL.numel()
    profiled = tokens if recipe.routed_by == "oracle" else min(tokens, PROFILED_TOKENS)
    adds = source.architecture.ffn.adds
    kept = 0 if on_disk else tokens * (3 if adds else 4) * hidden + profiled * width
    batch = min(tokens, BATCH_TOKENS) * (4 * width + 2 * hidden)
    clusters = 2 * min(tokens, 2 * CLUSTERING_TOKENS) * width
    if recipe.refit:
        batch += (2 * width + held_out(*prepared.windows_WL.shape)) * (width + hidden)
        batch += (2 if adds else 5) * tokens * hidden
    # As stored, to be written, and in float32, to compute the first hidden states.
    outside = source.outside_parameters * (4 + round(source.nbytes(None) / source.parameters))
    layer = source.layer_parameters + kept + max(batch, clusters)
    return max(4 * layer, outside + 12 * tokens * hidden, own_text_bytes(prepared))


def estimate(prepared: Prepared, work: WorkFolder) -> Plan:
    """Return the plan of a conversion that can be done."""
    source, config = prepared.source, prepared.config
    tokens, width = prepared.windows_WL.numel(), config.ffn_width
    resident = psutil.Process().memory_info().rss
    peak = resident + memory_bytes(prepared, prepared.settings.activations == "disk")
    available = resident + psutil.virtual_memory().available
    warnings = warnings_of(prepared)
    if prepared.device.type == "cpu" and peak > available:
        warnings.append(
            f"the conversion may need {peak / 1e9:.1f} GB of memory, but {available / 1e9:.1f} GB "
            "are free: lower --samples, or close other programs."
        )
    return Plan(
        output=str(work.output),
        notation=config.notation,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_width=width,
        expert_width=config.moe_intermediate_size,
        routed_experts=config.num_experts,
        parameters=source.parameters,
        active_parameters=active_parameters(source, config),
        activation_ratio=config.activation_ratio,
        speedup_bound=speedup(source, config),
        speedup_expected=speedup(source, config, ROUTING_SECONDS),
        calibration_tokens=tokens,
        refit_order=width if prepared.recipe.refit else None,
        device=str(prepared.device),
        activations=prepared.settings.activations,
        disk_bytes=disk_bytes(prepared),
        work_bytes=work_bytes(prepared),
        disk_free_bytes=free_disk(work)[1],
        peak_memory_bytes=peak,
        memory_available_bytes=available,
        seconds=seconds(prepared),
        warnings=warnings,
    )


def warnings_of(prepared: Prepared) -> list[str]:
    """Return what should be known of a conversion that can be done."""
    family = prepared.source.architecture.model_type
    untested = (
        f"no test of cmoe-hf carves a {family}: what its FFN computes is proven on the weights of "
        "every layer, and each carved layer is compared with the dense one. Please compare the "
        "models with `cmoe evaluate`, too."
    )
    found = [width_warning(prepared.config), None if family in TESTED else untested]
    return [warning for warning in found if warning]


def speedup(source: Source, config: CMoEConfig, routing: float = 0) -> float:
    """Return how much faster one sequence is decoded if a layer's routing takes so many seconds."""
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    carved = active_parameters(source, config) - table
    idle = config.num_parents_per_tok * (1 - config.activation_ratio)
    dense = carved + idle * source.ffn_parameters * config.num_hidden_layers
    routed = config.num_hidden_layers - len(config.dense_layers or ())
    itemsize = source.nbytes(None) / source.parameters
    rate = CPU_READS / itemsize * routed
    calls = EXPERT_SECONDS * (config.num_experts_per_tok - 1) if routing else 0
    # Many small experts take longer to call than to read: then all are run in one product.
    return dense / min(carved + rate * (routing + calls), dense + rate * routing)


def seconds(prepared: Prepared) -> float:
    """Guess the time from the passes over the tokens, systems to solve and a product's speed."""
    source, config, recipe = prepared.source, prepared.config, prepared.recipe
    width, tokens = config.ffn_width, prepared.windows_WL.numel()
    refits = recipe.refit * (1 + recipe.adaptive_split)
    passes = 1 + 2 * refits
    systems = config.num_parents * refits * (len(RIDGES) if recipe.held_out_ridge else 1)
    idle = (config.num_parents - config.num_parents_per_tok) * source.ffn_parameters
    work = passes * tokens * (source.layer_parameters - idle) + systems * width**3 / 2
    matrix = torch.ones(512, width, device=prepared.device)
    speed = matrix.numel() * 512 / best_seconds(lambda: matrix @ matrix.T, prepared.device)
    return config.num_hidden_layers * work / speed
