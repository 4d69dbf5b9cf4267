# SPDX-License-Identifier: Apache-2.0
"""A carved model that learns from the dense one, or by the paper's fine-tuning (section 5.1).

Shape suffixes: W windows, L tokens of one window.
"""

import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import torch
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedModel

from ..carve.settings import shard_bytes
from ..device import versions
from ..folder.card import CARD_FILE, recovered_card
from ..folder.fingerprint import write_fingerprint
from ..folder.json_utils import as_json
from ..folder.own_text import read_own, write_own
from ..folder.paths import replace_file
from ..folder.unfinished import SETTINGS, PartialFolder
from ..measure.evaluate import Quality, quality
from ..measure.routing import active_routers, always_on, count_loads, imbalance
from ..options import with_options
from ..plan import Prepared as Carving
from ..plan import check_disk, disk_bytes, work_bytes
from ..source.hub import public_name
from ..source.loading import window_length
from ..source.texts import Portion
from .distil import TrainingPlan, plan_training
from .prepare import Prepared, RecoverOptions, determinants, listed, on_cpus, prepare
from .settings import WINDOW, Tuning
from .tuning import last_checkpoint, tune

STAGES = "stages.json"


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What a recovery did; the keys of `cmoe recover --json`. Gaps are in log perplexity."""

    output: str
    notation: str
    steps: int
    training_tokens: int
    seconds: float
    perplexity_before: float
    """On the first text, as all figures that are not in `texts`."""
    perplexity_after: float
    imbalance_before: float | None
    """Coefficient of variation of the experts' loads, mean over layers; None without a router."""
    imbalance_after: float | None
    training_imbalance_before: float | None
    """The same on the training text, which the biases balance."""
    training_imbalance_after: float | None
    scale: float | None
    """Mean |u| after training; it starts at what the model had, 0 after carving."""
    texts: list[dict[str, Any]]
    """Of each text `before` and `after`: perplexity, and with a teacher also the perplexity, the
    divergence KL(teacher || model) and the agreement of the most likely token."""
    teacher_perplexity: float | None = None
    """Of the untouched dense model; None without a teacher."""
    gap_before: float | None = None
    """ln(carved / teacher), before any training."""
    gap_after: float | None = None
    """The same after it: what the carving costs in the end."""
    closed: float | None = None
    """Share of the gap that is gone."""


@with_options(RecoverOptions)
def recover(options: RecoverOptions) -> Recovery:
    """Train a carved model and write a repository like the one before.

    By default it learns the dense model's distribution of the next token: all weights of experts
    and norms if that fits into memory, else LoRA factors. The work grows in `output` + `.partial`;
    what stops can be continued with `resume_recovery`.

    Raises:
        RequestError: The request cannot be satisfied; nothing was started.
        CMoEError: The work failed; what was finished can be resumed.
    """
    output, overwrite = options.output, options.overwrite
    prepared, is_main = prepare(options), accelerate.PartialState().is_main_process
    if is_main:
        work = RecoveryFolder(output, overwrite=overwrite)
        work.check(prepared.read)
        weights = sum(path.stat().st_size for path in prepared.folder.glob("*.safetensors"))
        own_tokens = prepared.own_windows * prepared.tests[0].shape[1]
        check_disk(work, recovery_bytes(weights, prepared.plan, own_tokens))
    settings = {"options": asdict(prepared.options), "text_tokens": prepared.text_tokens}
    settings |= determinants(prepared)
    with owned_folder(output, settings, overwrite=overwrite) as work:
        if is_main:
            tests = {f"test{number}": it for number, it in enumerate(prepared.tests)}
            work.keep_windows(training=prepared.training_WL, **tests)
        # All processes do what the main one has decided.
        return run(replace(prepared, tuning=Tuning(**work.settings["options"]["tuning"])), work)


def resume_recovery(output: str | Path) -> Recovery:
    """Go on with the unfinished recovery into `output` from its last checkpoint.

    Raises:
        RequestError: There is none, or the model or a version have changed.
        CMoEError: The work failed again.
    """
    with owned_folder(output) as work:
        asked, kept = work.recorded("options"), None
        if (windows := work.kept_windows()) is not None:
            tests = [windows[f"test{number}"] for number in range(len(windows) - 1)]
            kept = (work.settings["text_tokens"], windows["training"], tests)
        try:
            options = RecoverOptions(**asked | {"tuning": Tuning(**asked["tuning"])})
        except TypeError as error:  # it has an option that is no longer there
            raise work.older() from error
        prepared = prepare(options, kept)
        work.check_apart(prepared.read)
        work.check_unchanged(determinants(prepared))
        return run(prepared, work)


def plan_recovery(carving: Carving, work: PartialFolder, tokens: int) -> TrainingPlan:
    """Plan the recovery of a model that is not carved yet, on tokens that its source generates.

    Raises `RequestError` if it cannot be.
    """
    accelerate.PartialState(cpu=carving.device.type == "cpu" or on_cpus())
    config, dense = carving.config, carving.source.config
    length = window_length(config, None, dense, usual=WINDOW["distil"])
    planned = plan_training(config, dense, Tuning(), None, carving.device, length)
    weights = disk_bytes(carving)
    needed = weights + work_bytes(carving) + recovery_bytes(weights, planned, tokens)
    check_disk(work, needed)
    return planned


def recovery_bytes(weights: int, planned: TrainingPlan, own_tokens: int) -> float:
    """Return what weights, checkpoints and own text take on the disk."""
    return 1.2 * weights + 3 * planned.checkpoint_bytes + 8 * own_tokens


class RecoveryFolder(PartialFolder):
    """A recovery's folder: `work/carved` holds checkpoints, and `work/stages.json` what is
    measured."""

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
        if checkpoint := last_checkpoint(self.private / "carved"):
            return f"Steps trained: {checkpoint.rpartition('-')[2]}"
        return super().finished

    def read_finished(self) -> None:
        """Take up the stages; the trainer finds the checkpoints itself."""
        if (self.private / STAGES).is_file():
            self.stages = json.loads((self.private / STAGES).read_text(encoding="utf-8"))

    def write_stage(self, name: str, figures: dict[str, Any]) -> None:
        """Record a finished stage, on the main process; its checkpoints are of no use any more."""
        self.stages[name] = figures
        if accelerate.PartialState().is_main_process:
            replace_file(self.private / STAGES, as_json(self.stages))
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
    """Tune the model, and complete the repository."""
    is_main = accelerate.PartialState().is_main_process
    if "carved" not in work.stages:
        if is_main:
            tqdm.write(prepared.plan.reason, file=sys.stderr)
        teacher, windows_WL = None, prepared.training_WL
        if prepared.options.teacher is not None:
            teacher = prepared.load(prepared.options.teacher).requires_grad_(False)
            if prepared.own_windows:
                own_WL = own_text(teacher, prepared, work.own_text)
                windows_WL = torch.cat([windows_WL, own_WL])
        work.write_stage("carved", tuned(prepared, work, windows_WL, teacher))
    result = summary(prepared, work)
    if is_main:
        write_beside_weights(prepared, work, result)
    return result


def own_text(teacher: PreTrainedModel, prepared: Prepared, folder: Path) -> torch.Tensor:
    """Return the windows that the teacher writes, or has written."""
    state, seed = accelerate.PartialState(), prepared.tuning.seed
    write_own(
        teacher,
        prepared.tokenizer,
        windows=prepared.own_windows,
        length=prepared.tests[0].shape[1],
        seed=seed,
        folder=folder,
        process=state.process_index,
        processes=state.num_processes,
    )
    state.wait_for_everyone()
    return read_own(folder, seed)


def tuned(
    prepared: Prepared,
    work: RecoveryFolder,
    windows_WL: torch.Tensor,
    teacher: PreTrainedModel | None,
) -> dict[str, Any]:
    """Measure, tune, measure and write the model."""
    start, options = time.perf_counter(), prepared.options
    loaded = prepared.load(options.model)
    measure = partial(quality_and_loads, prepared=prepared, teacher=teacher, training_WL=windows_WL)
    before = measure(loaded, description="before")
    checkpoints = work.private / "carved"
    loaded, losses = tune(loaded, windows_WL, prepared.tuning, checkpoints, teacher=teacher)
    after = measure(loaded, description="after")
    if accelerate.PartialState().is_main_process:
        loaded.config = AutoConfig.from_pretrained(prepared.folder)  # without `PLAIN_OUTPUTS`
        limit = shard_bytes(options.max_shard_size)
        loaded.save_pretrained(work.folder, max_shard_size=limit)
    return {
        "before": before,
        "after": after,
        "losses": losses,
        "scales": [gate.scale.tolist() for gate in active_routers(loaded)],
        "biases": [gate.balance_bias.tolist() for gate in active_routers(loaded)],
        "seconds": time.perf_counter() - start,
    }


def quality_and_loads(
    model: PreTrainedModel,
    prepared: Prepared,
    teacher: PreTrainedModel | None,
    training_WL: torch.Tensor,
    description: str,
) -> dict[str, Any]:
    """Measure on all texts, and without a teacher on the training text, which biases balance."""
    gates, first_WL = active_routers(model), prepared.tests[0]

    def once(windows_WL: torch.Tensor) -> dict[str, Any]:
        with count_loads(model) as loads:
            figures = quality(model, windows_WL, teacher, description=description)._asdict()
        if not gates:
            return figures
        return figures | {
            "imbalance": statistics.mean(map(imbalance, loads, map(always_on, gates))),
            "loads": [load_N.tolist() for load_N in loads],
        }

    found: dict[str, Any] = {"own": once(first_WL)}
    found["others"] = [once(windows_WL) for windows_WL in prepared.tests[1:]]
    if teacher is None:
        found["training_text"] = once(training_WL[: len(first_WL)])
    return found


def summary(prepared: Prepared, work: RecoveryFolder) -> Recovery:
    """Return the figures of all stages as those of the recovery."""
    carved = work.stages["carved"]
    names = [public_name(it) for it in listed(prepared.options.text)]
    length = prepared.tests[0].shape[1]
    figures: dict[str, Any] = {"texts": [{"text": name} for name in names]}
    for when in ("before", "after"):
        own = carved[when]["own"]
        figures[f"perplexity_{when}"] = own["perplexity"]
        figures[f"imbalance_{when}"] = own.get("imbalance")
        on_training = carved[when].get("training_text", {})
        figures[f"training_imbalance_{when}"] = on_training.get("imbalance")
        measured = [own, *carved[when]["others"]]
        for row, found in zip(figures["texts"], measured, strict=True):
            row[when] = {name: found[name] for name in Quality._fields if found[name] is not None}
        dense = figures["teacher_perplexity"] = own["baseline_perplexity"]
        if dense is not None:
            figures[f"gap_{when}"] = math.log(own["perplexity"] / dense)
    if gap := figures.get("gap_before"):
        figures["closed"] = 1 - figures["gap_after"] / gap
    scales = [abs(u) for layer in carved["scales"] for u in layer]
    return Recovery(
        output=str(work.output),
        notation=AutoConfig.from_pretrained(prepared.folder).notation,
        steps=prepared.tuning.steps(prepared.windows),
        training_tokens=int(prepared.windows * length * prepared.tuning.epochs),
        seconds=carved["seconds"],
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
    portions = [Portion.of(it) for it in listed(options.training)]
    report = {
        "tuning": asdict(prepared.tuning),
        "method_reason": prepared.plan.reason,
        "training": ", ".join(portion.name for portion in portions),
        "text": public_name(listed(options.text)[0]),
        "teacher": options.teacher and public_name(options.teacher),
        "training_text_tokens": prepared.text_tokens,
        "sequence_length": prepared.tests[0].shape[1],
        "versions": versions(),
        "device": prepared.device.type,
        "result": figures,
        "stages": work.stages,
    }
    work.write_json("recovery.json", report)
    if auxiliary.card:
        work.write_files({CARD_FILE: recovered_card(auxiliary.card, report, code)})
