# SPDX-License-Identifier: Apache-2.0
"""The verb `recover`: a carved model fine-tuned with LoRA and merged (paper, section 5.1).

Gains on the text that a model is tuned on are not recovery: tuning makes a dense model better
there, too. With a control, the dense model is tuned by the same recipe, and both are reported.

Shape suffixes: W windows, L tokens of one window.
"""

import hashlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, asdict, dataclass
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
from ..folder.unfinished import SETTINGS, PartialFolder, sha256_of
from ..measure.evaluate import perplexity
from ..measure.routing import (
    active_routers,
    always_on,
    count_loads,
    imbalance,
    is_biased,
    without_bias,
)
from ..options import LoadOptions, narrowed, with_options
from ..source.calibration import consecutive_windows, random_windows, read_tokens
from ..source.checkpoint import load_tokenizer
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
    """Coefficient of variation of the experts' loads, mean over layers; None for a model that does
    not route."""
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
class Request(LoadOptions):
    """What was asked for besides how to tune; both are frozen until the recovery ends."""

    model: str | Path
    """Folder or Hub id of a carved model."""
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


@dataclass(frozen=True)
class RecoverOptions(Request):
    """The options of `recover`."""

    output: str | Path
    """Folder to create."""
    _: KW_ONLY
    tuning: Tuning | None = None
    """How to tune, default the paper's settings."""
    overwrite: bool = False
    """Replace an existing model or unfinished recovery at `output`."""


@dataclass(frozen=True)
class Ready:
    """What a request needs, found and checked."""

    folder: Path
    """Of the carved model."""
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    text_tokens: int
    """Of the whole training text; the windows may take some of them several times."""
    training_WL: torch.Tensor
    test_WL: torch.Tensor
    auxiliary: AuxiliaryFiles
    """What the recovered model takes over from the carved one as it is."""


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
    request = narrowed(
        options,
        Request,
        model=absolute(options.model),
        training=absolute_text(options.training),
        text=absolute_text(options.text),
        teacher=None if options.teacher is None else absolute(options.teacher),
        control=None if options.control is None else absolute(options.control),
    )
    tuning, work = options.tuning or Tuning(), RecoveryFolder(output, overwrite=overwrite)
    ready = make_ready(request, tuning)
    if accelerate.PartialState().is_main_process:
        work.check(recovery_reads(request, ready))
        check_room(ready.folder, work)
    asked = {"request": asdict(request), "tuning": asdict(tuning)}
    settings = {**asked, **frozen_inputs(ready), "text_tokens": ready.text_tokens}
    with owned_folder(output, settings, overwrite=overwrite) as work:
        if accelerate.PartialState().is_main_process:
            work.keep_windows(training=ready.training_WL, test=ready.test_WL)
        return run(request, tuning, ready, work)


def resume_recovery(output: str | Path) -> Recovery:
    """Go on with the unfinished recovery into `output` from its last checkpoint.

    Raises:
        RequestError: There is none, or the model or a version have changed.
        CMoEError: The work failed again.
    """
    with owned_folder(output, None, overwrite=False) as work:
        request, tuning = Request(**work.settings["request"]), Tuning(**work.settings["tuning"])
        kept = None
        if (windows := work.kept_windows()) is not None:
            kept = (work.settings["text_tokens"], windows["training"], windows["test"])
        ready = make_ready(request, tuning, kept)
        work.check_apart(recovery_reads(request, ready))
        work.check_unchanged(frozen_inputs(ready))
        return run(request, tuning, ready, work)


Texts = tuple[int, torch.Tensor, torch.Tensor]
"""Tokens of the training text, the windows to train on, and those to measure on."""


def make_ready(request: Request, tuning: Tuning, kept: Texts | None = None) -> Ready:
    """Check all but the weights, and read the texts unless `kept`. Raises `RequestError`."""
    check_peft()
    check_sharding()
    check_dtype(request.dtype)
    shard_bytes(request.max_shard_size)  # refuses what is no size
    if request.dtype == "float16":
        raise RequestError("float16 overflows in training: choose bfloat16 or float32.")
    state = accelerate.PartialState(cpu=request.device == "cpu" or on_cpus())
    tuning.split(state.num_processes)
    device = state.device if state.num_processes > 1 else find_device(request.device)
    if request.training == request.text and text_file(request.text):
        raise RequestError(
            "the text to measure on is the text to train on: its perplexity would say nothing. "
            "Give another --text."
        )
    folder, _ = model_folder(request.model)
    config = load_config(folder, request.trust_remote_code)
    if not isinstance(config, CMoEConfig):
        raise RequestError(
            f"{folder.name} is a {config.model_type} model, not a carved one: `cmoe convert` it "
            "first."
        )
    tokenizer = load_tokenizer(folder, trust_remote_code=request.trust_remote_code)
    others = []
    for dense in {it for it in (request.teacher, request.control) if it is not None}:
        trusted = request.trust_remote_code
        others.append(load_config(dense, trusted))
        other = load_tokenizer(model_folder(dense)[0], trust_remote_code=trusted)
        if other.get_vocab() != tokenizer.get_vocab():
            raise RequestError(f"{dense} has another vocabulary than {request.model}.")
    vocabulary = min(it.vocab_size for it in (config, *others))
    length = window_length(config, tuning.sequence_length, *others)
    if kept is None:
        texts = (open_text(request.training, part="train"), open_text(request.text, part="test"))
        ids, test_ids = (read_tokens(text, tokenizer, vocabulary).ids for text in texts)
        draw = partial(random_windows, samples=tuning.samples, seed=tuning.seed, least=LEAST_TEXT)
        kept = (len(ids), draw(ids, length=length), consecutive_windows(test_ids, length=length))
    return Ready(folder, device, tokenizer, *kept, read_auxiliary_files(folder))


def recovery_reads(request: Request, ready: Ready) -> dict[str, str | Path | None]:
    """What a recovery reads from this machine, by what to call it."""
    return {
        "the carved model": ready.folder,
        "the training text": text_file(request.training),
        "the text to measure on": text_file(request.text),
        "the teacher": request.teacher,
        "the control": request.control,
    }


def on_cpus() -> bool:
    """Whether processes compute on CPUs; untold, accelerate would take each for the only one."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def check_room(folder: Path, work: PartialFolder) -> None:
    """Refuse a disk without room for the result. Raises `RequestError`."""
    needed = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    place = next(path for path in work.output.parents if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed * 1.2:
        raise RequestError(
            f"the recovered model and its checkpoints need {needed * 1.2 / 1e9:.2f} GB, but "
            f"{place} has {free / 1e9:.2f} GB free."
        )


def frozen_inputs(ready: Ready) -> dict[str, str]:
    """What besides the settings determines the result, under names that people understand."""
    weights = "".join(sha256_of(path) for path in sorted(ready.folder.glob("*.safetensors")))
    windows = ready.training_WL.numpy().tobytes() + ready.test_WL.numpy().tobytes()
    return {
        **{f"version_of_{name}": version for name, version in versions().items()},
        "model": hashlib.sha256(weights.encode()).hexdigest(),
        "texts": hashlib.sha256(windows).hexdigest(),
    }


class RecoveryFolder(PartialFolder):
    """A recovery's folder: `work/carved` and `work/control` hold checkpoints of the two models.

    `work/stages.json` holds what is measured, and how long it took.
    """

    command = "recover"
    noun = "recovery"

    def __init__(self, output: str | Path, *, overwrite: bool = False) -> None:
        super().__init__(output, overwrite=overwrite)
        self.stages: dict[str, Any] = {}

    @property
    def finished(self) -> str:
        """The last checkpoint, or which model is ready, in words."""
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
    output: str | Path, settings: dict[str, Any] | None, *, overwrite: bool
) -> Iterator[RecoveryFolder]:
    """The folder, created with `settings` or reopened; only the main process owns it."""
    state = accelerate.PartialState(cpu=on_cpus())
    if state.is_main_process:
        owned = (
            RecoveryFolder.reopen(output)
            if settings is None
            else RecoveryFolder.create(output, settings, overwrite=overwrite)
        )
        with owned as work:
            state.wait_for_everyone()
            yield work
            state.wait_for_everyone()
    else:
        state.wait_for_everyone()
        work = RecoveryFolder(output)
        work.settings = json.loads((work.private / SETTINGS).read_text(encoding="utf-8"))
        work.read_finished()
        yield work
        state.wait_for_everyone()


def run(request: Request, tuning: Tuning, ready: Ready, work: RecoveryFolder) -> Recovery:
    """Tune the carved model, then the control, and complete the repository."""
    for stage, model in (("carved", request.model), ("control", request.control)):
        if model is not None and stage not in work.stages:
            work.write_stage(stage, tuned(request, model, tuning, ready, work, stage))
    result = recovery_of(tuning, ready, work)
    if accelerate.PartialState().is_main_process:
        write_beside_weights(request, tuning, ready, work, result)
    return result


def tuned(
    request: Request,
    model: str | Path,
    tuning: Tuning,
    ready: Ready,
    work: RecoveryFolder,
    stage: str,
) -> dict[str, Any]:
    """Measure, tune and measure one model; the carved one is written."""
    start = time.perf_counter()
    where = (request.dtype, ready.device, request.trust_remote_code)
    loaded, _ = load_model(model, *where)
    before = quality_and_loads(loaded, ready, f"{stage} before")
    if stage == "control" and model == request.teacher:  # it would learn what it knows
        return {"before": before, "after": before, "losses": [], "seconds": 0.0}
    teacher = None
    if request.teacher is not None:
        teacher = load_model(request.teacher, *where)[0].requires_grad_(False)
    options: dict[str, Any] = {"teacher": teacher, "description": f"tuning {stage}"}
    loaded, losses = tune(loaded, ready.training_WL, tuning, work.private / stage, **options)
    after = quality_and_loads(loaded, ready, f"{stage} after")
    figures = {"before": before, "after": after, "losses": losses}
    if stage == "carved":
        figures["scales"] = [gate.scale.tolist() for gate in active_routers(loaded)]
        figures["biases"] = [gate.balance_bias.tolist() for gate in active_routers(loaded)]
        if accelerate.PartialState().is_main_process:
            limit = shard_bytes(request.max_shard_size)
            loaded.config = AutoConfig.from_pretrained(ready.folder)  # without `PLAIN_OUTPUTS`
            loaded.save_pretrained(work.folder, max_shard_size=limit)
    return {**figures, "seconds": time.perf_counter() - start}


def quality_and_loads(model: PreTrainedModel, ready: Ready, description: str) -> dict[str, Any]:
    """On the text to measure on, as the model is and without its balance biases, and on the
    training text."""
    gates = active_routers(model)

    def once(windows_WL: torch.Tensor) -> dict[str, Any]:
        with count_loads(model) as loads:
            measured = perplexity(model, windows_WL, description=description)
        if not gates:
            return {"perplexity": measured}
        return {
            "perplexity": measured,
            "imbalance": statistics.mean(map(imbalance, loads, map(always_on, gates))),
            "loads": [load_N.tolist() for load_N in loads],
        }

    figures = {
        "own": once(ready.test_WL),
        "training_text": once(ready.training_WL[: len(ready.test_WL)]),
    }
    if any(is_biased(gate) for gate in gates):
        with without_bias(model):
            figures["without_bias"] = once(ready.test_WL)
    return figures


def recovery_of(tuning: Tuning, ready: Ready, work: RecoveryFolder) -> Recovery:
    """The figures of all stages as those of the recovery."""
    carved, control = work.stages["carved"], work.stages.get("control")
    before, after = carved["before"]["own"], carved["after"]["own"]
    unbiased = carved["after"].get("without_bias", {})
    config = AutoConfig.from_pretrained(ready.folder)
    scales = [abs(u) for layer in carved["scales"] for u in layer]
    gaps: dict[str, float | None] = {}
    if control is not None:
        dense = [control[when]["own"]["perplexity"] for when in ("before", "after")]
        distance = math.log(before["perplexity"] / dense[1])
        gone = math.log(before["perplexity"] / after["perplexity"])
        gaps = {
            "control_before": dense[0],
            "control_after": dense[1],
            "gap_before": math.log(before["perplexity"] / dense[0]),
            "gap_after": math.log(after["perplexity"] / dense[1]),
            "closed": gone / distance if distance else None,
        }
    return Recovery(
        output=str(work.output),
        notation=config.notation,
        steps=tuning.steps(len(ready.training_WL)),
        training_tokens=int(ready.training_WL.numel() * tuning.epochs),
        seconds=sum(stage["seconds"] for stage in work.stages.values()),
        perplexity_before=before["perplexity"],
        perplexity_after=after["perplexity"],
        perplexity_after_without_bias=unbiased.get("perplexity"),
        imbalance_before=before.get("imbalance"),
        imbalance_after=after.get("imbalance"),
        imbalance_after_without_bias=unbiased.get("imbalance"),
        training_imbalance_before=carved["before"]["training_text"].get("imbalance"),
        training_imbalance_after=carved["after"]["training_text"].get("imbalance"),
        scale=statistics.mean(scales) if scales else None,
        **gaps,
    )


def write_beside_weights(
    request: Request, tuning: Tuning, ready: Ready, work: RecoveryFolder, result: Recovery
) -> None:
    """Write everything beside the weights."""
    code = work.write_code(type(AutoConfig.from_pretrained(ready.folder)))
    work.write_files(ready.auxiliary.files)
    write_fingerprint(ready.folder, work, ready.tokenizer)
    figures = asdict(result)
    del figures["output"]
    report = {
        "tuning": asdict(tuning),
        "training": public_name(request.training),
        "text": public_name(request.text),
        "teacher": request.teacher and public_name(request.teacher),
        "control": request.control and public_name(request.control),
        "training_text_tokens": ready.text_tokens,
        "sequence_length": ready.training_WL.shape[1],
        "versions": versions(),
        "device": ready.device.type,
        "result": figures,
        "stages": work.stages,
    }
    work.write_json("recovery.json", report)
    if card := ready.auxiliary.card:
        work.write_text(CARD_FILE, recovered_card(card, report, code))
