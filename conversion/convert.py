# SPDX-License-Identifier: Apache-2.0
"""From a dense checkpoint to a complete CMoE repository."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import torch
from tqdm import tqdm

from cmoe_hf import CMoEHierarchicalConfig

from .carve.decoder import Storage, Streams, record_batches
from .carve.hierarchy import MoEWalk
from .carve.pipeline import ModelWalk
from .carve.recipe import Recipe
from .carve.settings import NORMAL, ConvertOptions, Settings, absolute, shard_bytes
from .carve.shape import Shape
from .device import DTYPES, peak_memory_bytes, versions
from .errors import RequestError
from .folder.card import CARD_FILE, model_card
from .folder.fingerprint import CONVERSION, fingerprint_of
from .folder.layerwise import WorkFolder, planned_tensors
from .folder.own_text import read_own, write_own
from .options import narrowed, with_options
from .plan import Prepared, prepare, prepare_work, warnings_of
from .source.loading import load_model

logger = logging.getLogger(__name__)


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


@with_options(ConvertOptions)
def convert(options: ConvertOptions) -> Conversion:
    """Carve a dense model into a CMoE repository.

    Give `budget`, or `experts`, `shared` and `active`. The repository grows in `output` +
    `.partial`; what stops before it is complete can be continued with `resume`.

    Raises:
        RequestError: The request cannot be satisfied; nothing was started.
        CMoEError: The work failed; nothing was left at `output`.
    """
    settings = narrowed(options, Settings)
    prepared, work = prepare_work(options.model, options.output, settings)
    for warning in warnings_of(prepared):
        logger.warning("%s", warning)
    frozen = {
        "model": absolute(options.model),
        "settings": asdict(prepared.settings),
        "threads": torch.get_num_threads(),
        "calibration": prepared.calibration,
        **determinants(prepared),
    }
    with WorkFolder.create(work.output, frozen, overwrite=settings.overwrite) as work:
        if not prepared.windows_WL.is_meta:
            work.keep_windows(calibration=prepared.windows_WL)
        return carve(prepared, work)


def resume(output: str | Path, overrides: Mapping[str, Any] | None = None) -> Conversion:
    """Go on with the unfinished conversion into `output`, as if it had never stopped.

    Args:
        output: The folder that the conversion was to create.
        overrides: `model` and fields of `Settings` that must be what the conversion began with.

    Raises:
        RequestError: There is none, or what determines the result is no longer the same.
        CMoEError: The work failed again, or what was finished is damaged.
    """
    with WorkFolder.reopen(output) as work:
        record, model = work.recorded("settings"), work.settings["model"]
        try:
            settings = Settings(**record | {"recipe": Recipe(**record["recipe"])})
        except TypeError as error:  # it has an option that is no longer there
            raise work.older() from error
        known = {**vars(settings), "model": model}
        for name, value in (overrides or {}).items():
            if name == "model":
                value = absolute(value)
            elif name in NORMAL:
                value = getattr(replace(settings, **{name: value}), name)
            if value != known[name]:
                raise RequestError(
                    f"{name} was {known[name]!r} when this conversion started and cannot become "
                    f"{value!r} now. Leave it out, or start again with --overwrite."
                )
        kept = None
        if (windows := work.kept_windows()) is not None:
            kept = (windows["calibration"], work.settings["calibration"])
        prepared = prepare(model, settings, kept)
        work.check_apart(prepared.read)
        work.check_unchanged(determinants(prepared))
        threads = torch.get_num_threads()
        torch.set_num_threads(work.settings["threads"])  # their number changes the last bits
        try:
            return carve(prepared, work)
        finally:
            torch.set_num_threads(threads)


def determinants(prepared: Prepared) -> dict[str, str]:
    """Return what besides the settings determines the result, under names for people."""
    windows_WL = prepared.windows_WL  # what the dense model writes, the checkpoint determines
    ids = b"" if windows_WL.is_meta else windows_WL.numpy().tobytes()
    packages = {f"version_of_{name}": it for name, it in versions().items() if name != "python"}
    return {
        **packages,
        "device": str(prepared.device),
        "calibration_text": hashlib.sha256(ids).hexdigest(),
        "source_checkpoint": prepared.source.digest(),
    }


@torch.no_grad()
def carve(prepared: Prepared, work: WorkFolder) -> Conversion:
    """Carve the layers that are not finished yet, and complete the repository."""
    if prepared.windows_WL.is_meta:
        prepared = with_own_text(prepared, work)
    source, settings, recipe = prepared.source, prepared.settings, prepared.recipe
    is_moe, total = source.architecture.router is not None, prepared.config.num_hidden_layers
    on_disk = settings.activations == "disk"
    storage = Storage(prepared.device, work.private if on_disk else None)
    dtype = DTYPES[settings.dtype] if settings.dtype else None
    planned = planned_tensors(source, prepared.config, dtype)
    work.create_weights(planned, shard_bytes(settings.max_shard_size))
    rest = source.read_rest()
    work.write_rest(rest)
    layers = source.walk(rest, prepared.device)
    del rest
    record_batches(layers, *prepared.windows_WL.shape)
    if not (states := work.read_states()):
        has_dense = recipe.needs_dense_stream and not is_moe
        names = ("carved", "dense") if has_dense else ("carved",)
        states = dict.fromkeys(names, layers.embed(prepared.windows_WL))
    streams = Streams.restored(states, storage)
    layers.forget_rest()
    del states
    carved = (MoEWalk if is_moe else ModelWalk)(
        source,
        layers,
        streams,
        prepared.config,
        recipe,
        storage,
        k_act=settings.k_act,
        first=work.layers_done,
    )
    done = work.layers_done
    with tqdm(total=total, initial=done, desc="carving", unit="layer", disable=None) as bar:
        for index, tensors, figures in carved:
            work.write_layer(index, total, tensors, figures, streams.saved())
            del tensors
            resident = psutil.Process().memory_info().rss / 1e9
            bar.set_postfix(memory=f"{resident:.1f}GB", tokens=streams.tokens)
            bar.update()
            work.log(
                f"layer {index + 1} of {total}: relative error "
                f"{figures['relative_output_error']:.4f}, carving pass "
                f"{figures['seconds']['carving_pass']:.1f} s, memory {resident:.2f} GB"
            )
    return complete(prepared, work)


def with_own_text(prepared: Prepared, work: WorkFolder) -> Prepared:
    """Let the dense model write the calibration windows, as far as they are not there."""
    (windows, length), seed = prepared.windows_WL.shape, prepared.settings.seed
    if not work.layers_done:
        trusted = prepared.settings.trust_remote_code
        model, tokenizer = load_model(prepared.source.folder, None, prepared.device, trusted)
        write_own(model, tokenizer, windows=windows, length=length, seed=seed, folder=work.own_text)
    windows_WL = read_own(work.own_text, seed)
    sha256 = hashlib.sha256(windows_WL.numpy().tobytes()).hexdigest()
    record = {**prepared.calibration, "sha256": sha256}
    return replace(prepared, windows_WL=windows_WL, calibration=record)


def complete(prepared: Prepared, work: WorkFolder) -> Conversion:
    """Write everything beside the weights."""
    config = prepared.config
    if isinstance(config, CMoEHierarchicalConfig):
        kept = [layer["kept_parents"] for layer in work.figures]
        config.kept_parents = kept if any(kept) else None
    always_on = [list(range(layer.get("pinned_experts", 0))) for layer in work.figures]
    config.always_on_experts = always_on if any(always_on) else None
    work.write_files(prepared.auxiliary.files)
    config.save_pretrained(work.folder)
    code = work.write_code(type(config))
    fingerprint = fingerprint_of(work.folder, prepared.tokenizer)
    seconds = {
        name: sum(layer["seconds"][name] for layer in work.figures)
        for name in ("carving_pass", "bare_forward")
    }
    result = Conversion(
        output=str(work.output),
        notation=config.notation,
        activation_ratio=config.activation_ratio,
        calibration_tokens=prepared.windows_WL.numel(),
        seconds=work.seconds,
        peak_memory_bytes=peak_memory_bytes(prepared.device),
        relative_output_error=fmean(layer["relative_output_error"] for layer in work.figures),
        carving_ratio=seconds["carving_pass"] / seconds["bare_forward"],
    )
    report = conversion_report(prepared, result, work.figures)
    work.write_json(CONVERSION, report | {"fingerprint": fingerprint})
    card = model_card(prepared.source, config, report, code, prepared.auxiliary.licence)
    work.write_files({CARD_FILE: card})
    return result


def conversion_report(
    prepared: Prepared, result: Conversion, layers: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the content of `conversion.json`: no path, user name or token reaches it."""
    figures = asdict(result)
    del figures["output"]
    source, settings, config = prepared.source, prepared.settings, prepared.config
    stated = ("budget", "samples", "sequence_length", "k_act", "seed", "dtype")
    return {
        "source": {"name": source.name, "revision": source.revision},
        "settings": {
            **asdict(Shape.parse(config.notation)),
            "dense_layers": config.dense_layers or [],
            **{name: getattr(settings, name) for name in stated},
            "recipe": prepared.recipe.title,
            "calibration": prepared.calibration["source"],
        },
        "recipe": asdict(prepared.recipe),
        "calibration": prepared.calibration,
        "versions": versions(),
        "device": prepared.device.type,
        "result": figures,
        "layers": layers,
    }
