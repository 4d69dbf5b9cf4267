# SPDX-License-Identifier: Apache-2.0
"""The verb `convert`: a dense checkpoint in, a complete CMoE repository out."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

import psutil
import torch
import transformers
from tqdm import tqdm

import cmoe_hf
from cmoe_hf import CMoEHierarchicalConfig

from .carve.decoder import Storage, Streams
from .carve.hierarchy import carve_model as carve_moe
from .carve.pipeline import carve_model
from .carve.settings import Job, Options, shard_bytes
from .carve.shape import parent_config, width_warning
from .device import DTYPES, peak_memory_bytes, versions
from .errors import RequestError
from .folder.card import model_card
from .folder.fingerprint import CONVERSION, fingerprint_of
from .folder.layerwise import WorkFolder
from .folder.windows import keep_windows, kept_windows
from .plan import Prepared, check_disk, prepare, read_by, settled

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


def convert(
    model: str | Path, output: str | Path, *, overwrite: bool = False, **options: Unpack[Options]
) -> Conversion:
    """Carve the dense model `model` (folder or Hub id) into a CMoE repository at `output`.

    The repository grows in `output` + `.partial` and appears at `output` when it is complete. What
    stops before that can be continued with `resume`.

    Args:
        model: Folder or Hub id of a supported dense model, with tokenizer and safetensors.
        output: Folder to create.
        overwrite: Replace an existing model repository or unfinished conversion at `output`.
        options: See `settings.Options`; `experts`, and `budget` or `shared` and `active`, must be
            given.

    Returns:
        What was done, with times in seconds and memory in bytes.

    Raises:
        RequestError: The request cannot be satisfied; nothing was started.
        CMoEError: The work failed; nothing was left at `output`.
    """
    job = Job.of(model, **options)
    prepared = prepare(job)
    job = settled(job, prepared)
    work = WorkFolder(output, overwrite=overwrite)
    work.check(read_by(job, prepared))
    check_disk(job, prepared, work)
    if warning := width_warning(prepared.config):
        logger.warning("%s", warning)
    frozen = {"job": job.record(), "threads": torch.get_num_threads(), **fingerprint(prepared)}
    frozen["calibration"] = prepared.calibration
    with WorkFolder.create(output, frozen, overwrite=overwrite) as work:
        keep_windows(work, calibration=prepared.windows_WL)
        return carve(job, prepared, work)


def resume(output: str | Path, overrides: Mapping[str, Any] | None = None) -> Conversion:
    """Go on with the unfinished conversion into `output`, as if it had never stopped.

    Args:
        output: The folder that the conversion was to create.
        overrides: Settings that the caller believes to be in force, by their names in
            `settings.Options`. They must be.

    Raises:
        RequestError: There is none, or something that determines the result is no longer the
            same: an override, the source checkpoint, a version.
        CMoEError: The work failed again, or what was finished is damaged.
    """
    with WorkFolder.reopen(output) as work:
        job = Job.from_record(work.settings["job"])
        known = {**asdict(job.settings), **job.record()}
        for name, value in (overrides or {}).items():
            if value != known[name]:
                raise RequestError(
                    f"{name} was {known[name]!r} when this conversion started and cannot become "
                    f"{value!r} now. Leave it out, or start again with --overwrite."
                )
        kept = None
        if (windows := kept_windows(work)) is not None:
            kept = (windows["calibration"], work.settings["calibration"])
        prepared = prepare(job, kept)
        work.check_apart(read_by(job, prepared))
        work.check_unchanged(fingerprint(prepared))
        threads = torch.get_num_threads()
        torch.set_num_threads(work.settings["threads"])  # their number changes the last bits
        try:
            return carve(job, prepared, work)
        finally:
            torch.set_num_threads(threads)


def fingerprint(prepared: Prepared) -> dict[str, str]:
    """What besides the settings determines the result, under names that people understand."""
    ids = prepared.windows_WL.numpy().tobytes()
    return {
        "version_of_cmoe_hf": cmoe_hf.__version__,
        "version_of_torch": torch.__version__,
        "version_of_transformers": transformers.__version__,
        "device": str(prepared.device),
        "calibration_text": hashlib.sha256(ids).hexdigest(),
        "source_checkpoint": prepared.source.digest(),
    }


@torch.no_grad()
def carve(job: Job, prepared: Prepared, work: WorkFolder) -> Conversion:
    """Carve the layers that are not finished yet, and complete the repository."""
    source, config, settings = prepared.source, prepared.config, job.settings
    storage = Storage(prepared.device, work.private if job.activations == "disk" else None)
    rest = source.read_rest()
    named = {source.architecture.carved_name(name): tensor for name, tensor in rest.items()}
    work.write_rest(in_dtype(named, settings.dtype))
    states = work.read_states()
    if states:
        streams = Streams.restored(states, storage)
    else:
        embedding = rest[source.architecture.embedding]
        streams = Streams.embedded(
            embedding,
            prepared.windows_WL,
            storage,
            dense=settings.choices.needs_dense_stream and source.architecture.router is None,
        )
    del rest, named, states
    how: dict[str, Any] = {"first": work.layers_done, "k_act": settings.k_act, "storage": storage}
    if isinstance(config, CMoEHierarchicalConfig):
        inner = parent_config(config, settings)
        carved = carve_moe(source, streams, config, inner, settings.choices, **how)
    else:
        carved = carve_model(source, streams, config, settings.choices, **how)
    total, done = config.num_hidden_layers, work.layers_done
    with tqdm(total=total, initial=done, desc="carving", unit="layer", disable=None) as bar:
        for index, tensors, figures in carved:
            work.write_layer(
                index, total, in_dtype(tensors, settings.dtype), figures, streams.saved()
            )
            del tensors
            resident = psutil.Process().memory_info().rss / 1e9
            bar.set_postfix(memory=f"{resident:.1f}GB", tokens=streams.tokens)
            bar.update()
            work.log(
                f"layer {index + 1} of {total}: relative error "
                f"{figures['relative_output_error']:.4f}, carving pass "
                f"{figures['seconds']['carving_pass']:.1f} s, memory {resident:.2f} GB"
            )
    return complete(job, prepared, work)


def complete(job: Job, prepared: Prepared, work: WorkFolder) -> Conversion:
    """Write everything beside the weights."""
    if isinstance(prepared.config, CMoEHierarchicalConfig):
        kept = [layer["kept_parents"] for layer in work.figures]
        prepared.config.kept_parents = kept if any(kept) else None
    work.join(shard_bytes(job.max_shard_size))
    code = write_loading_files(work, prepared)
    fingerprint = fingerprint_of(work.folder, prepared.tokenizer)
    result = Conversion(
        output=str(work.output),
        notation=job.settings.notation,
        activation_ratio=prepared.config.activation_ratio,
        calibration_tokens=prepared.windows_WL.numel(),
        seconds=work.seconds,
        peak_memory_bytes=peak_memory_bytes(prepared.device),
        **summary(work.figures),
    )
    report = conversion_report(job, prepared, result, work.figures)
    work.write_json(CONVERSION, report | {"fingerprint": fingerprint})
    licence = prepared.carried.licence
    card = model_card(prepared.source, prepared.config, report, code, licence)
    work.write_text("README.md", card)
    return result


def write_loading_files(work: WorkFolder, prepared: Prepared) -> dict[str, str]:
    """Everything beside the weights that a loader needs, and the source's legal files.

    Returns the hashes of the Python files.
    """
    prepared.config.save_pretrained(work.folder)
    code = work.write_code(type(prepared.config))
    work.write_files(prepared.carried.files)
    return code


def summary(layers: list[dict[str, Any]]) -> dict[str, float]:
    """The figures of all layers as those of the whole model."""
    errors = [layer["relative_output_error"] for layer in layers]
    bare = sum(layer["seconds"]["bare_forward"] for layer in layers)
    carving = sum(layer["seconds"]["carving_pass"] for layer in layers)
    return {"relative_output_error": sum(errors) / len(errors), "carving_ratio": carving / bare}


def in_dtype(tensors: dict[str, torch.Tensor], dtype: str | None) -> dict[str, torch.Tensor]:
    """The tensors in the precision asked for; the balance bias is always float32."""
    if dtype is None:
        return tensors
    return {
        name: tensor if name.endswith("balance_bias") else tensor.to(DTYPES[dtype])
        for name, tensor in tensors.items()
    }


def conversion_report(
    job: Job, prepared: Prepared, result: Conversion, layers: list[dict[str, Any]]
) -> dict[str, Any]:
    """The content of `conversion.json`: no path, user name or token reaches it."""
    figures = asdict(result)
    del figures["output"]
    source, calibration = prepared.source, prepared.calibration
    return {
        "source": {"name": source.name, "revision": source.revision},
        "settings": {**asdict(job.settings), "calibration": calibration["source"]},
        "recipe": asdict(job.settings.choices),
        "calibration": calibration,
        "versions": versions(),
        "device": prepared.device.type,
        "result": figures,
        "layers": layers,
    }
