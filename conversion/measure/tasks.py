# SPDX-License-Identifier: Apache-2.0
"""The verb `evaluate_tasks`: tasks of the lm-evaluation-harness, dense beside carved.

Needs the extra `[eval]`. The harness makes the prompts and the scores, with its own seeds, so that
the figures are those of its command `lm_eval`.
"""

import importlib.metadata
import importlib.util
import logging
import math
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import KW_ONLY, asdict, dataclass
from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..device import check_dtype, find_device
from ..errors import CMoEError, RequestError, missing
from ..folder.results import results_folder, write_results
from ..options import LoadOptions, with_options
from ..source.checkpoint import find_model
from ..source.loading import load_model

logger = logging.getLogger(__name__)

# Source: run_cmoe.py of the released code, but for MMLU (paper v3, Table 2) and ARC-Easy (v3,
# Table 1, where every task is zero-shot).
PAPER_TASKS = {
    "boolq": 32,
    "sciq": 0,
    "piqa": 0,
    "winogrande": 5,
    "arc_easy": 0,
    "arc_challenge": 25,
    "hellaswag": 10,
    "mmlu": 5,
}
"""The paper's tasks and their few-shot counts."""

PREFERRED_METRICS = ("acc_norm", "acc")

Suite = dict[str, Any]
"""What the harness loads for a name: `tasks` and `groups` by name, and `group_map`, the names of
each group's members."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task, or the aggregate of a group of them."""

    task: str
    metric: str
    """`acc_norm` where the harness offers it, else `acc`, else the task's first metric."""
    few_shot: int | None
    """Examples in front of each question; None for a group whose tasks differ."""
    documents: int
    value: float
    stderr: float | None
    """Standard error of the value, from the harness."""
    baseline_value: float | None
    """Of the dense model on the same prompts, None without `baseline`."""
    baseline_stderr: float | None


@dataclass(frozen=True, kw_only=True)
class TaskEvaluation:
    """What was measured; the keys of `cmoe evaluate --tasks --json`."""

    tasks: list[TaskResult]
    limit: int | None
    """Only so many documents of each task were used: not a figure to compare with others."""


@dataclass(frozen=True)
class TaskOptions(LoadOptions):
    """The options of `evaluate_tasks`."""

    model: str | Path
    """Folder or Hub id of a carved or dense model."""
    _: KW_ONLY
    tasks: Sequence[str]
    """Tasks, groups or tags of the lm-evaluation-harness to measure instead; paper for those of the
    paper."""
    baseline: str | Path | None = None
    """The dense model, measured in the same run."""
    few_shot: int | None = None
    """Examples in each prompt; default the paper's or the task's."""
    limit: int | None = None
    """Only the first documents of each task, for a quick look."""
    include_path: str | Path | None = None
    """Folder with tasks of your own (YAML)."""
    batch_size: int = 1
    """Requests of a task in a batch."""
    card: bool = False
    """Write the results into `evaluation.json` and the card in the model's folder."""


@with_options(TaskOptions)
def evaluate_tasks(options: TaskOptions) -> TaskEvaluation:
    """Measure a model, and its dense baseline in the same run, on tasks of the harness.

    The metric of a task is `acc_norm` where the harness offers it, else `acc`, else its first.

    Raises:
        RequestError: The request cannot be satisfied; no model was loaded.
        CMoEError: A model or a task's data cannot be reached, or the model yields NaN.
    """
    model, tasks, baseline, card = options.model, options.tasks, options.baseline, options.card
    few_shot, limit, include_path = options.few_shot, options.limit, options.include_path
    batch_size, dtype, device = options.batch_size, options.dtype, options.device
    trust_remote_code = options.trust_remote_code
    check_harness()
    check_numbers(few_shot=few_shot, limit=limit, batch_size=batch_size)
    check_dtype(dtype)
    where = find_device(device)
    folder = results_folder(model) if card else None
    find_model(model)
    if baseline is not None:
        find_model(baseline)
    suites = load_suites(tasks, few_shot, include_path)

    measure = partial(
        run_harness,
        suites=suites,
        limit=limit,
        batch_size=batch_size,
        dtype=dtype,
        device=where,
        trust_remote_code=trust_remote_code,
    )
    carved = measure(model)  # returns figures only: one model in memory at a time
    dense = measure(baseline) if baseline is not None else [None] * len(suites)
    rows = [
        task_result(name, suites[requested], of_carved, of_dense)
        for requested, of_carved, of_dense in zip(suites, carved, dense, strict=True)
        for name in reported(requested, suites[requested], of_carved["results"])
    ]
    if folder is not None:
        records = [{**asdict(row), "limit": limit} for row in rows]
        lm_eval = importlib.metadata.version("lm_eval")
        write_results(
            folder, records, baseline=baseline, dtype=dtype, device=where, lm_eval=lm_eval
        )
    return TaskEvaluation(tasks=rows, limit=limit)


def check_harness() -> None:
    """Raises `RequestError` if the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise missing("tasks need lm_eval", "eval")


def check_numbers(*, few_shot: int | None, limit: int | None, batch_size: int) -> None:
    """Raises `RequestError` for a number that is too small."""
    if few_shot is not None and few_shot < 0:
        raise RequestError(f"--few-shot is {few_shot}; it must be 0 or more.")
    if limit is not None and limit < 1:
        raise RequestError(f"--limit is {limit}; it must be at least 1.")
    if batch_size < 1:
        raise RequestError(f"--batch-size is {batch_size}; it must be at least 1.")


def load_suites(
    tasks: Sequence[str], few_shot: int | None, include_path: str | Path | None
) -> dict[str, Suite]:
    """The tasks behind each name, with their data and few-shot counts.

    Raises `RequestError` for a name that the harness does not know and for a task that cannot
    be run as asked, `CMoEError` for data that cannot be loaded.
    """
    names = [name.strip() for name in tasks]
    names = [one for name in names for one in (PAPER_TASKS if name == "paper" else [name]) if one]
    if not names:
        raise RequestError("--tasks names no task. Give some, such as boolq,piqa, or paper.")
    suites = {}
    with harness():
        manager = task_manager(names, include_path)
        seed_as_the_harness_does()  # some tasks shuffle their choices when they are loaded
        for name in dict.fromkeys(names):
            try:
                suites[name] = manager.load([name])
            except Exception as error:  # of data sets, templates, or the task's own Python
                raise CMoEError(f"task {name} cannot be loaded: {_reason(error)}") from error
        for name, suite in suites.items():
            asked = few_shot if few_shot is not None else PAPER_TASKS.get(name)
            for task in suite["tasks"].values():
                set_few_shot(task, asked)
    return suites


def task_manager(names: Sequence[str], include_path: str | Path | None) -> Any:
    """The harness's table of tasks. Raises `RequestError` for a name that is not in it."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).expanduser().is_dir():
        raise RequestError(f"--include-path {include_path} is not a folder.")
    own = Path(include_path).expanduser() if include_path is not None else None
    manager = TaskManager(include_path=own, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):  # a group may have members of the harness
        for name, entry in stock_tasks().items():
            manager.task_index.setdefault(name, entry)
    for name in names:
        if name not in manager.task_index:
            near = ", ".join(get_close_matches(name, manager.task_index))
            raise RequestError(
                f"there is no task {name!r}{near and f'; near it are {near}'}. `lm-eval ls tasks` "
                "lists the names; tasks of your own need --include-path."
            )
    return manager


@cache
def stock_tasks() -> dict[str, Any]:
    """The tasks of the harness by name. Reads some 14,000 files: about 10 seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager().task_index


def set_few_shot(task: Any, few_shot: int | None) -> None:
    """Set a task's few-shot count and make one prompt, so that what fails fails early."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    name, own = task.task_name, task.get_config("num_fewshot")
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise RequestError(
            f"task {name} runs code that the model writes, or shows it images or sound. Neither "
            "is done here: use `lm_eval` itself."
        )
    count = (own or 0) if few_shot is None else few_shot
    if own == 0 and count != 0:  # the harness would ignore the count
        raise RequestError(
            f"task {name} has its examples in its prompt and takes no others: leave --few-shot "
            "out, or measure it in a run of its own."
        )
    task.set_config(key="num_fewshot", value=count)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    try:
        task.build_all_requests(limit=1)
    except Exception as error:  # of samplers, templates, or the task's own Python
        raise RequestError(
            f"task {name} cannot make a prompt with {count} examples: {_reason(error)}. It may "
            "have fewer documents to take them from: lower --few-shot."
        ) from error


def run_harness(
    model: str | Path,
    *,
    suites: dict[str, Suite],
    limit: int | None,
    batch_size: int,
    dtype: str | None,
    device: torch.device,
    trust_remote_code: bool,
) -> list[dict[str, Any]]:
    """Load a model and let the harness measure it: its answer for each suite.

    Raises `CMoEError` if the model yields NaN.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    loaded, tokenizer = load_model(model, dtype, device, trust_remote_code)
    answers = []
    with harness() as counter:
        wrapped = HFLM(
            pretrained=loaded, tokenizer=tokenizer, backend="causal", batch_size=batch_size
        )
        for suite in suites.values():
            seed_as_the_harness_does()
            for task in suite["tasks"].values():
                task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)  # the same examples every time
            answers.append(evaluate(wrapped, task_dict=suite, limit=limit, log_samples=False))
            check_finite(suite)
    if counter.truncated:
        logger.warning(
            "%d requests were longer than the model's context of %d tokens and lost their "
            "beginning: --few-shot with fewer examples would keep it.",
            counter.truncated,
            wrapped.max_length,
        )
    return answers


def check_finite(suite: Suite) -> None:
    """Raises `CMoEError` if a log-likelihood is NaN: the harness would count it as an answer."""
    for task in suite["tasks"].values():
        for request in task.instances:
            for response in request.resps:
                value = response[0] if isinstance(response, tuple) else response
                if isinstance(value, float) and math.isnan(value):
                    raise CMoEError(
                        f"the model yields NaN on the task {task.task_name}: its weights are "
                        "damaged or its precision overflows. Try --dtype float32."
                    )


def reported(name: str, suite: Suite, results: dict[str, Any]) -> list[str]:
    """The rows for a name: itself, or the members of a tag or of a group without aggregate."""
    if name not in suite["groups"]:
        return [name] if name in suite["tasks"] else list(suite["tasks"])
    if chosen_metric(results.get(name, {})) is not None:
        return [name]
    return [row for member in suite["group_map"][name] for row in reported(member, suite, results)]


def task_result(
    name: str, suite: Suite, carved: dict[str, Any], dense: dict[str, Any] | None
) -> TaskResult:
    """The row of a task or a group, from the harness's answers."""
    group = suite["groups"].get(name)
    members = group.get_all_tasks() if group is not None else [suite["tasks"][name]]
    counts = {member.get_config("num_fewshot") for member in members}
    key = chosen_metric(carved["results"][name])
    if key is None:
        raise CMoEError(f"the harness has no figure for the task {name}.")
    metric, _, filtered = key.partition(",")
    value, stderr = _figure(carved, name, key)
    baseline_value, baseline_stderr = _figure(dense, name, key) if dense else (None, None)
    assert value is not None
    return TaskResult(
        task=name,
        metric=metric if filtered == "none" else key,
        few_shot=counts.pop() if len(counts) == 1 else None,
        documents=sum(carved["n-samples"][member.task_name]["effective"] for member in members),
        value=value,
        stderr=stderr,
        baseline_value=baseline_value,
        baseline_stderr=baseline_stderr,
    )


def chosen_metric(figures: dict[str, Any]) -> str | None:
    """The key `metric,filter` to report: `acc_norm`, else `acc`, else the first; None if none."""
    keys = [key for key in figures if "," in key and "_stderr," not in key]
    for metric in PREFERRED_METRICS:
        for key in keys:
            if key.partition(",")[0] == metric:
                return key
    return keys[0] if keys else None


def _figure(answer: dict[str, Any], name: str, key: str) -> tuple[float | None, float | None]:
    """Value and standard error; the harness says `N/A` for an error that it does not know."""
    figures = answer["results"][name]
    stderr = figures.get(key.replace(",", "_stderr,", 1))
    return float(figures[key]), stderr if isinstance(stderr, float) else None


def seed_as_the_harness_does() -> None:
    """The seeds that `lm_eval` sets: without them some prompts would differ from its own."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)


class TruncationCounter(logging.Handler):
    """Counts, in what the harness logs, the requests that it truncated."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.truncated = 0

    def emit(self, record: logging.LogRecord) -> None:
        """The harness warns of each request: too many to print."""
        self.truncated += "Truncating" in record.getMessage()


@contextmanager
def harness() -> Iterator[TruncationCounter]:
    """While the harness works: nothing on standard output, progress bars only on a terminal."""
    log, counter = logging.getLogger("lm_eval"), TruncationCounter()
    propagate, log.propagate = log.propagate, False
    log.addHandler(counter)
    try:
        with ExitStack() as stack:
            if not sys.stderr.isatty():
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(redirect_stderr(nowhere))
            stack.enter_context(redirect_stdout(sys.stderr))
            yield counter
    finally:
        log.removeHandler(counter)
        log.propagate = propagate


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
