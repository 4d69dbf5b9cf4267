# SPDX-License-Identifier: Apache-2.0
"""A carved model fine-tuned with LoRA and merged (paper, section 5.1).

Tuning makes a dense model better on such text, too. With a control, the dense model is tuned by
the same recipe, and both are reported.

Shape suffixes: W windows, L tokens of one window.
"""

import hashlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.utils import parse_flag_from_env
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from cmoe_hf import CMoEConfig

from ..carve.settings import MAX_SHARD_SIZE, absolute, public_name, shard_bytes
from ..device import check_dtype, find_device, versions
from ..errors import RequestError
from ..folder.auxiliary_files import AuxiliaryFiles, read_auxiliary_files
from ..folder.card import CARD_FILE, recovered_card
from ..folder.fingerprint import write_fingerprint
from ..folder.json_utils import as_json
from ..folder.paths import resolved
from ..folder.unfinished import SETTINGS, PartialFolder, sha256_of
from ..measure.evaluate import check_same_vocabulary, perplexity
from ..measure.routing import (
    active_routers,
    always_on,
    count_loads,
    imbalance,
    is_biased,
    without_bias,
)
from ..options import LoadOptions, with_options
from ..plan import free_disk
from ..source.calibration import consecutive_windows, random_windows, read_tokens
from ..source.hub import load_tokenizer
from ..source.loading import load_config, load_model, model_folder, window_length
from ..source.texts import absolute_text, open_text, text_file
from .tuning import Tuning, check_peft, check_sharding, last_checkpoint, tune

STAGES = "stages.json"
LEAST_TEXT = 0.25
"""Of the tokens that the windows take, what the text must have: they may overlap."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What a recovery did; the keys of `cmoe recover --json`. Gaps are in log perplexity."""

    output: str
    notation: str
    steps: int
    training_tokens: int
    seconds: float
    perplexity_before: float
    perplexity_after: float
    perplexity_after_without_bias: float | None
    """With the balance biases set to zero; None if they did not move."""
    imbalance_before: float | None
    """Coefficient of variation of the experts' loads, mean over layers; None without a router."""
    imbalance_after: float | None
    imbalance_after_without_bias: float | None
    training_imbalance_before: float | None
    """The same on the training text, which the biases balance."""
    training_imbalance_after: float | None
    scale: float | None
    """Mean |u| after training; it starts at what the model had, 0 after carving."""
    control_before: float | None = None
    """Perplexity of the dense model; None without a control."""
    control_after: float | None = None
    """Of the dense model tuned by the same recipe."""
    gap_before: float | None = None
    """ln(carved / dense), both untuned."""
    gap_after: float | None = None
    """ln(carved / dense), both tuned: what the carving costs in the end."""
    closed: float | None = None
    """Share of the distance to the tuned dense model that the carved one went:
    ln(before / after) / ln(before / control_after)."""


@dataclass(frozen=True)
class RecoverOptions(LoadOptions):
    """The options of `recover`; all of them are frozen until the recovery ends."""

    model: str | Path
    """Folder or Hub id of a carved model."""
    output: str | Path
    """Folder to create."""
    _: KW_ONLY
    training: str | Path = "wikitext2"
    """Text to learn from: file, wikitext2, c4 or a Hub data set (their training parts)."""
    text: str | Path = "wikitext2"
    """Text to measure perplexity on (its test part); never the training text."""
    teacher: str | Path | None = None
    """Learn the next-token distribution of this dense model instead of the text's next tokens."""
    control: str | Path | None = None
    """The dense model: tune it by the same recipe and compare."""
    dtype: str | None = None
    """float32 or bfloat16; default the checkpoint's precision."""
    max_shard_size: str | int = MAX_SHARD_SIZE
    """Of a file of weights, for example 500MB or 2GiB; one file up to it."""
    tuning: Tuning | None = None
    """How to tune, default the paper's settings."""
    overwrite: bool = False
    """Replace an existing model or unfinished recovery at `output`."""

    def __post_init__(self) -> None:
        """Make paths absolute: a recovery can be resumed from anywhere."""
        object.__setattr__(self, "output", str(resolved(self.output)))
        for name in ("model", "teacher", "control"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, absolute(value))
        for name in ("training", "text"):
            object.__setattr__(self, name, absolute_text(getattr(self, name)))


@dataclass(frozen=True)
class Prepared:
    """What a recovery needs, found and checked."""

    options: RecoverOptions
    tuning: Tuning
    folder: Path
    """Of the carved model."""
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    auxiliary: AuxiliaryFiles
    """What the recovered model takes over from the carved one as it is."""
    text_tokens: int
    """Of the whole training text; the windows may take some of them several times."""
    training_WL: torch.Tensor
    test_WL: torch.Tensor

    @property
    def read(self) -> dict[str, str | Path | None]:
        """Return what is read from this machine, by what to call it."""
        return {
            "the carved model": self.folder,
            "the training text": text_file(self.options.training),
            "the text to measure on": text_file(self.options.text),
            "the teacher": self.options.teacher,
            "the control": self.options.control,
        }


@with_options(RecoverOptions)
def recover(options: RecoverOptions) -> Recovery:
    """Fine-tune a carved model with LoRA, merge, and write a repository like the one before.

    Trained are attention, shared and routed experts, the gate scale u and the balance bias. The
    work grows in `output` + `.partial`; what stops can be continued with `resume_recovery`.

    Raises:
        RequestError: The request cannot be satisfied; nothing was started.
        CMoEError: The work failed; what was finished can be resumed.
    """
    output, overwrite = options.output, options.overwrite
    prepared, is_main = prepare(options), accelerate.PartialState().is_main_process
    if is_main:
        work = RecoveryFolder(output, overwrite=overwrite)
        work.check(prepared.read)
        check_disk(prepared.folder, work)
    settings = {"options": asdict(prepared.options), "text_tokens": prepared.text_tokens}
    settings |= determinants(prepared)
    with owned_folder(output, settings, overwrite=overwrite) as work:
        if is_main:
            work.keep_windows(training=prepared.training_WL, test=prepared.test_WL)
        return run(prepared, work)


def resume_recovery(output: str | Path) -> Recovery:
    """Go on with the unfinished recovery into `output` from its last checkpoint.

    Raises:
        RequestError: There is none, or the model or a version have changed.
        CMoEError: The work failed again.
    """
    with owned_folder(output) as work:
        asked, kept = work.recorded("options"), None
        if (windows := work.kept_windows()) is not None:
            kept = (work.settings["text_tokens"], windows["training"], windows["test"])
        prepared = prepare(RecoverOptions(**asked | {"tuning": Tuning(**asked["tuning"])}), kept)
        work.check_apart(prepared.read)
        work.check_unchanged(determinants(prepared))
        return run(prepared, work)


Texts = tuple[int, torch.Tensor, torch.Tensor]
"""Tokens of the training text, the windows to train on, and those to measure on."""


def prepare(options: RecoverOptions, kept: Texts | None = None) -> Prepared:
    """Check all but the weights, and read the texts unless `kept`. Raises `RequestError`."""
    check_peft()
    check_sharding()
    check_dtype(options.dtype)
    shard_bytes(options.max_shard_size)
    if options.dtype == "float16":
        raise RequestError("float16 overflows in training: choose bfloat16 or float32.")
    tuning = options.tuning or Tuning()
    state = accelerate.PartialState(cpu=options.device == "cpu" or on_cpus())
    tuning.split(state.num_processes)
    device = state.device if state.num_processes > 1 else find_device(options.device)
    if options.training == options.text and text_file(options.text):
        raise RequestError(
            "the text to measure on is the text to train on: its perplexity would say nothing. "
            "Give another --text."
        )
    folder, trusted = model_folder(options.model)[0], options.trust_remote_code
    config = load_config(folder, trusted)
    if not isinstance(config, CMoEConfig):
        raise RequestError(
            f"{folder.name} is a {config.model_type} model, not a carved one: `cmoe convert` it "
            "first."
        )
    tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
    others = {it for it in (options.teacher, options.control) if it is not None}
    configs = [config, *(load_config(other, trusted) for other in others)]
    for other in others:
        theirs = load_tokenizer(model_folder(other)[0], trust_remote_code=trusted)
        check_same_vocabulary(other, theirs, tokenizer)
    length = window_length(config, tuning.sequence_length, *configs[1:])
    if kept is None:
        vocabulary = min(it.vocab_size for it in configs)
        texts = (open_text(options.training, part="train"), open_text(options.text, part="test"))
        ids, test_ids = (read_tokens(text, tokenizer, vocabulary).ids for text in texts)
        draw = partial(random_windows, samples=tuning.samples, seed=tuning.seed, least=LEAST_TEXT)
        kept = (len(ids), draw(ids, length=length), consecutive_windows(test_ids, length=length))
    asked = replace(options, tuning=tuning)
    return Prepared(asked, tuning, folder, device, tokenizer, read_auxiliary_files(folder), *kept)


def on_cpus() -> bool:
    """Return whether processes compute on CPUs: accelerate would take each for the only one."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def check_disk(folder: Path, work: PartialFolder) -> None:
    """Raise `RequestError` if the result and its checkpoints would not fit on the disk."""
    needed = 1.2 * sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    place, free = free_disk(work)
    if free < needed:
        raise RequestError(
            f"the recovered model and its checkpoints need {needed / 1e9:.2f} GB, but {place} has "
            f"{free / 1e9:.2f} GB free."
        )


def determinants(prepared: Prepared) -> dict[str, str]:
    """Return what besides the options determines the result, under names that people understand."""
    weights = "".join(sha256_of(path) for path in sorted(prepared.folder.glob("*.safetensors")))
    windows = prepared.training_WL.numpy().tobytes() + prepared.test_WL.numpy().tobytes()
    return {
        **{f"version_of_{name}": version for name, version in versions().items()},
        "model": hashlib.sha256(weights.encode()).hexdigest(),
        "texts": hashlib.sha256(windows).hexdigest(),
    }


class RecoveryFolder(PartialFolder):
    """A recovery's folder: `work/carved` and `work/control` hold the checkpoints of two models, and
    `work/stages.json` what is measured."""

    command = "recover"
    noun = "recovery"

    def __init__(self, output: str | Path, *, overwrite: bool = False) -> None:
        super().__init__(output, overwrite=overwrite)
        self.stages: dict[str, Any] = {}

    @property
    def finished(self) -> str:
        """Return the last checkpoint, or which model is ready, in words."""
        if "carved" in self.stages:
            return "The carved model is trained"
        checkpoint = last_checkpoint(self.private / "carved")
        return f"Steps trained: {checkpoint.rpartition('-')[2]}" if checkpoint else ""

    def read_finished(self) -> None:
        """Take up the stages; the trainer finds the checkpoints itself."""
        if (self.private / STAGES).is_file():
            self.stages = json.loads((self.private / STAGES).read_text(encoding="utf-8"))

    def write_stage(self, name: str, figures: dict[str, Any]) -> None:
        """Record a finished stage, on the main process; its checkpoints are of no use any more."""
        self.stages[name] = figures
        if accelerate.PartialState().is_main_process:
            self.replace(self.private / STAGES, as_json(self.stages))
            shutil.rmtree(self.private / name, ignore_errors=True)


@contextmanager
def owned_folder(
    output: str | Path, settings: dict[str, Any] | None = None, *, overwrite: bool = False
) -> Iterator[RecoveryFolder]:
    """Create the folder with `settings`, or reopen it; only the main process owns it."""
    state = accelerate.PartialState(cpu=on_cpus())
    with ExitStack() as stack:
        work = RecoveryFolder(output)
        if state.is_main_process:
            if settings is None:
                work = RecoveryFolder.reopen(output)
            else:
                work = RecoveryFolder.create(output, settings, overwrite=overwrite)
            stack.enter_context(work)
        state.wait_for_everyone()
        if not state.is_main_process:
            work.settings = json.loads((work.private / SETTINGS).read_text(encoding="utf-8"))
            work.read_finished()
        yield work
        state.wait_for_everyone()


def run(prepared: Prepared, work: RecoveryFolder) -> Recovery:
    """Tune the carved model, then the control, and complete the repository."""
    options = prepared.options
    for stage, model in (("carved", options.model), ("control", options.control)):
        if model is not None and stage not in work.stages:
            work.write_stage(stage, tuned(prepared, work, stage, model))
    result = summary(prepared, work)
    if accelerate.PartialState().is_main_process:
        write_beside_weights(prepared, work, result)
    return result


def tuned(
    prepared: Prepared, work: RecoveryFolder, stage: str, model: str | Path
) -> dict[str, Any]:
    """Measure, tune and measure one model; the carved one is written."""
    start, options = time.perf_counter(), prepared.options
    load = partial(
        load_model,
        dtype=options.dtype,
        device=prepared.device,
        trust_remote_code=options.trust_remote_code,
    )
    loaded, _ = load(model)
    before = quality_and_loads(loaded, prepared, f"{stage} before")
    if stage == "control" and model == options.teacher:  # it would learn what it knows
        return {"before": before, "after": before, "losses": [], "seconds": 0.0}
    teacher = None if options.teacher is None else load(options.teacher)[0].requires_grad_(False)
    loaded, losses = tune(
        loaded,
        prepared.training_WL,
        prepared.tuning,
        work.private / stage,
        teacher=teacher,
        description=f"tuning {stage}",
    )
    after = quality_and_loads(loaded, prepared, f"{stage} after")
    figures = {"before": before, "after": after, "losses": losses}
    if stage == "carved":
        figures["scales"] = [gate.scale.tolist() for gate in active_routers(loaded)]
        figures["biases"] = [gate.balance_bias.tolist() for gate in active_routers(loaded)]
        if accelerate.PartialState().is_main_process:
            loaded.config = AutoConfig.from_pretrained(prepared.folder)  # without `PLAIN_OUTPUTS`
            limit = shard_bytes(options.max_shard_size)
            loaded.save_pretrained(work.folder, max_shard_size=limit)
    return {**figures, "seconds": time.perf_counter() - start}


def quality_and_loads(
    model: PreTrainedModel, prepared: Prepared, description: str
) -> dict[str, Any]:
    """Measure on both texts, and on that to measure on without the balance biases, too."""
    gates, test_WL = active_routers(model), prepared.test_WL

    def once(windows_WL: torch.Tensor) -> dict[str, Any]:
        with count_loads(model) as loads:
            figures = {"perplexity": perplexity(model, windows_WL, description=description)}
        if not gates:
            return figures
        return figures | {
            "imbalance": statistics.mean(map(imbalance, loads, map(always_on, gates))),
            "loads": [load_N.tolist() for load_N in loads],
        }

    found = {"own": once(test_WL), "training_text": once(prepared.training_WL[: len(test_WL)])}
    if any(map(is_biased, gates)):
        with without_bias(model):
            found["without_bias"] = once(test_WL)
    return found


def summary(prepared: Prepared, work: RecoveryFolder) -> Recovery:
    """Return the figures of all stages as those of the recovery."""
    carved, control = work.stages["carved"], work.stages.get("control")
    windows_WL = prepared.training_WL
    figures: dict[str, Any] = {}
    for when in ("before", "after"):
        own = carved[when]["own"]
        figures[f"perplexity_{when}"] = own["perplexity"]
        figures[f"imbalance_{when}"] = own.get("imbalance")
        figures[f"training_imbalance_{when}"] = carved[when]["training_text"].get("imbalance")
        if control is not None:
            dense = control[when]["own"]["perplexity"]
            figures[f"control_{when}"] = dense
            figures[f"gap_{when}"] = math.log(own["perplexity"] / dense)
    if control is not None:
        before = figures["perplexity_before"]
        if distance := math.log(before / figures["control_after"]):
            figures["closed"] = math.log(before / figures["perplexity_after"]) / distance
    for figure in ("perplexity", "imbalance"):
        unbiased = carved["after"].get("without_bias", {})
        figures[f"{figure}_after_without_bias"] = unbiased.get(figure)
    scales = [abs(u) for layer in carved["scales"] for u in layer]
    return Recovery(
        output=str(work.output),
        notation=AutoConfig.from_pretrained(prepared.folder).notation,
        steps=prepared.tuning.steps(len(windows_WL)),
        training_tokens=int(windows_WL.numel() * prepared.tuning.epochs),
        seconds=sum(stage["seconds"] for stage in work.stages.values()),
        scale=statistics.mean(scales) if scales else None,
        **figures,
    )


def write_beside_weights(prepared: Prepared, work: RecoveryFolder, result: Recovery) -> None:
    """Write everything beside the weights."""
    options, auxiliary = prepared.options, prepared.auxiliary
    code = work.write_code(type(AutoConfig.from_pretrained(prepared.folder)))
    work.write_files(auxiliary.files)
    write_fingerprint(prepared.folder, work, prepared.tokenizer)
    figures = asdict(result)
    del figures["output"]
    sources = {name: getattr(options, name) for name in ("training", "text", "teacher", "control")}
    report = {
        "tuning": asdict(prepared.tuning),
        **{name: source and public_name(source) for name, source in sources.items()},
        "training_text_tokens": prepared.text_tokens,
        "sequence_length": prepared.training_WL.shape[1],
        "versions": versions(),
        "device": prepared.device.type,
        "result": figures,
        "stages": work.stages,
    }
    work.write_json("recovery.json", report)
    if auxiliary.card:
        work.write_text(CARD_FILE, recovered_card(auxiliary.card, report, code))
