# SPDX-License-Identifier: Apache-2.0
"""Tasks of the lm-evaluation-harness, dense beside carved. Needs the extra `[eval]`."""

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
from functools import partial
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..device import check_dtype, find_device
from ..errors import CMoEError, RequestError, check_at_least, missing
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
    if importlib.util.find_spec("lm_eval") is None:
        raise missing("tasks need lm_eval", "eval")
    check_at_least(0, few_shot=few_shot)
    check_at_least(1, limit=limit, batch_size=batch_size)
    check_dtype(dtype)
    where = find_device(device)
    folder = results_folder(model) if card else None
    models = [model] if baseline is None else [model, baseline]
    for each in models:
        find_model(each)
    with harness():
        names = task_names(tasks)
        manager = task_manager(names, include_path)
        requested = load_tasks(names, manager, few_shot)
    run = partial(
        run_harness,
        requested=requested,
        manager=manager,
        limit=limit,
        batch_size=batch_size,
        loading={"dtype": dtype, "device": where, "trust_remote_code": trust_remote_code},
    )
    answers = [run(each) for each in models]  # one model in memory at a time
    rows = [row for name in requested for row in task_results(name, answers)]
    if folder is not None:
        records = [{**asdict(row), "limit": limit} for row in rows]
        version = importlib.metadata.version("lm_eval")
        write_results(
            folder, records, baseline=baseline, dtype=dtype, device=where, lm_eval=version
        )
    return TaskEvaluation(tasks=rows, limit=limit)


def task_names(tasks: Sequence[str]) -> list[str]:
    """Return each name once, those of `PAPER_TASKS` for "paper". Raise `RequestError` for none."""
    names = [name.strip() for name in tasks if name.strip()]
    names = [each for name in names for each in (PAPER_TASKS if name == "paper" else [name])]
    if not names:
        raise RequestError("--tasks names no task. Give some, such as boolq,piqa, or paper.")
    return list(dict.fromkeys(names))


def task_manager(names: Sequence[str], include_path: str | Path | None) -> Any:
    """Return the harness's table of tasks. Raise `RequestError` for a name that is not in it."""
    from lm_eval.tasks import TaskManager

    own = None
    if include_path is not None:
        own = Path(include_path).expanduser()
        if not own.is_dir():
            raise RequestError(f"--include-path {include_path} is not a folder.")
    manager = TaskManager(include_path=own, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):  # a group may have members of the harness
        manager = TaskManager(include_path=own)  # reads some 14,000 files: about 10 seconds
    for name in names:
        if name not in manager.all_tasks:
            near = ", ".join(get_close_matches(name, manager.all_tasks))
            raise RequestError(
                f"there is no task {name!r}{near and f'; near it are {near}'}. `lm-eval ls tasks` "
                "lists the names; tasks of your own need --include-path."
            )
    return manager


def load_tasks(names: Sequence[str], manager: Any, few_shot: int | None) -> dict[str, Any]:
    """Return the harness's tasks and groups by name, loaded with their data; a tag's tasks for it.

    Raises:
        RequestError: A task cannot be run as asked, or two names share one.
        CMoEError: The data of a task cannot be loaded.
    """
    # Some tasks shuffle their choices while they are loaded: the seeds are simple_evaluate's.
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)
    requested: dict[str, Any] = {}
    for name in names:
        try:
            found = manager.load([name])
        except Exception as error:  # of data sets, templates, or the task's own Python
            raise CMoEError(f"task {name} cannot be loaded: {_reason(error)}") from error
        for task in found["tasks"].values():
            set_few_shot(task, PAPER_TASKS.get(name) if few_shot is None else few_shot)
        groups = found["groups"]
        requested |= {name: groups[name]} if name in groups else found["tasks"]
    try:
        manager.load(list(requested.values()))
    except ValueError as error:
        raise RequestError(f"{error}. Measure them in runs of their own.") from error
    return requested


def set_few_shot(task: Any, few_shot: int | None) -> None:
    """Set a task's few-shot count and make one prompt, so that what fails fails early."""
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
    task.set_fewshot_seed(seed=1234)
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
    requested: dict[str, Any],
    manager: Any,
    limit: int | None,
    batch_size: int,
    loading: dict[str, Any],
) -> dict[str, Any]:
    """Return what the harness measures of a model. Raise `CMoEError` if the model yields NaN."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    loaded, tokenizer = load_model(model, **loading)
    with harness() as messages:
        wrapped = HFLM(
            pretrained=loaded, tokenizer=tokenizer, backend="causal", batch_size=batch_size
        )
        answer: dict[str, Any] = simple_evaluate(
            model=wrapped,
            tasks=list(requested.values()),
            task_manager=manager,
            limit=limit,
            log_samples=False,
        )
    for item in requested.values():
        for task in item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]:
            check_finite(task)
    if truncated := sum("Truncating" in message.getMessage() for message in messages):
        logger.warning(
            "%d requests were longer than the model's context of %d tokens and lost their "
            "beginning: --few-shot with fewer examples would keep it.",
            truncated,
            wrapped.max_length,
        )
    return answer


def check_finite(task: Any) -> None:
    """Raise `CMoEError` if a log-likelihood is NaN: the harness would count it as an answer."""
    responses = [response for request in task.instances for response in request.resps]
    values = [each[0] if isinstance(each, tuple) else each for each in responses]
    if any(isinstance(value, float) and math.isnan(value) for value in values):
        raise CMoEError(
            f"the model yields NaN on the task {task.task_name}: its weights are damaged or its "
            "precision overflows. Try --dtype float32."
        )


def task_results(name: str, answers: Sequence[dict[str, Any]]) -> list[TaskResult]:
    """Return the row of a task or group, or those of the members of a group without aggregate.

    `answers` are the harness's for the carved model and, if it was measured, the dense one.
    """
    answer = answers[0]
    members = answer["group_subtasks"].get(name)
    key = chosen_metric(answer["results"][name])
    if key is None and members:
        return [row for member in members for row in task_results(member, answers)]
    if key is None:
        raise CMoEError(f"the harness has no figure for the task {name}.")
    leaves = leaf_tasks(name, answer["group_subtasks"])
    counts = {answer["n-shot"][leaf] for leaf in leaves}
    figures = [each["results"][name] for each in answers]
    values = [float(each[key]) for each in figures]
    # The harness says "N/A" for an error that it does not know.
    errors = [each.get(key.replace(",", "_stderr,", 1)) for each in figures]
    stderrs = [each if isinstance(each, float) else None for each in errors]
    row = TaskResult(
        task=name,
        metric=key.removesuffix(",none"),
        few_shot=counts.pop() if len(counts) == 1 else None,
        documents=sum(answer["n-samples"][leaf]["effective"] for leaf in leaves),
        value=values[0],
        stderr=stderrs[0],
        baseline_value=values[1] if len(values) > 1 else None,
        baseline_stderr=stderrs[1] if len(values) > 1 else None,
    )
    return [row]


def leaf_tasks(name: str, members: dict[str, list[str]]) -> list[str]:
    """Return the tasks of a group and of the groups in it; of a task, itself."""
    if not members.get(name):
        return [name]
    return [leaf for member in members[name] for leaf in leaf_tasks(member, members)]


def chosen_metric(figures: dict[str, Any]) -> str | None:
    """Return the key `metric,filter` to report: `acc_norm`, else `acc`, else the first, or None."""
    keys = [key for key in figures if "," in key and "_stderr," not in key]
    preferred = [
        key for metric in PREFERRED_METRICS for key in keys if key.startswith(f"{metric},")
    ]
    return next(iter(preferred + keys), None)


@contextmanager
def harness() -> Iterator[list[logging.LogRecord]]:
    """Keep standard output clean, and progress bars to a terminal; yield what the harness logs.

    It warns of every request that it truncates: too many to print.
    """
    log, messages = logging.getLogger("lm_eval"), BufferingHandler(sys.maxsize)
    propagate, log.propagate = log.propagate, False
    log.addHandler(messages)
    try:
        with ExitStack() as stack:
            if not sys.stderr.isatty():
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(redirect_stderr(nowhere))
            stack.enter_context(redirect_stdout(sys.stderr))
            yield messages.buffer
    finally:
        log.removeHandler(messages)
        log.propagate = propagate


def _reason(error: Exception) -> str:
    """Return what went wrong, in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
