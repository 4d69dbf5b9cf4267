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

from ..device import DTYPES, find_device
from ..errors import CMoEError, RequestError, check_at_least, check_known, missing
from ..folder.results import results_folder, write_results
from ..options import LoadOptions, with_options
from ..source.hub import find_model
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
    if importlib.util.find_spec("lm_eval") is None:
        raise missing("tasks need lm_eval", "eval")
    check_at_least(0, few_shot=options.few_shot)
    check_at_least(1, limit=options.limit, batch_size=options.batch_size)
    check_known("dtype", options.dtype, DTYPES)
    where = find_device(options.device)
    folder = results_folder(options.model) if options.card else None
    models = [it for it in (options.model, options.baseline) if it is not None]
    for model in models:
        find_model(model)
    with harness():
        names = task_names(options.tasks)
        manager = task_manager(names, options.include_path)
        requested = load_tasks(names, manager, options.few_shot)
    run = partial(run_harness, requested, manager, options, where)
    answers = [run(model) for model in models]  # one model in memory at a time
    rows = [row for name in requested for row in task_results(name, answers)]
    if folder is not None:
        write_results(
            folder,
            [{**asdict(row), "limit": options.limit} for row in rows],
            baseline=options.baseline,
            dtype=options.dtype,
            device=where,
            lm_eval=importlib.metadata.version("lm_eval"),
        )
    return TaskEvaluation(tasks=rows, limit=options.limit)


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

    own = None if include_path is None else Path(include_path).expanduser()
    if own is not None and not own.is_dir():
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
    requested: dict[str, Any],
    manager: Any,
    options: TaskOptions,
    device: torch.device,
    model: str | Path,
) -> dict[str, Any]:
    """Return what the harness measures of a model. Raise `CMoEError` if the model yields NaN."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    loaded, tokenizer = load_model(model, options.dtype, device, options.trust_remote_code)
    tasks = list(requested.values())
    with harness() as messages:
        batch: Any = {"backend": "causal", "batch_size": options.batch_size}
        wrapped = HFLM(pretrained=loaded, tokenizer=tokenizer, **batch)
        asked = {"tasks": tasks, "task_manager": manager, "limit": options.limit}
        answer: dict[str, Any] = simple_evaluate(model=wrapped, log_samples=False, **asked)
    for item in tasks:
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
    for response in (response for request in task.instances for response in request.resps):
        value = response[0] if isinstance(response, tuple) else response
        if isinstance(value, float) and math.isnan(value):
            raise CMoEError(
                f"the model yields NaN on the task {task.task_name}: its weights are damaged or "
                "its precision overflows. Try --dtype float32."
            )


def task_results(name: str, answers: Sequence[dict[str, Any]]) -> list[TaskResult]:
    """Return the row of a task or group, or those of the members of a group without aggregate.

    `answers` are the harness's for the carved model and, if it was measured, the dense one.
    """
    answer, members = answers[0], answers[0]["group_subtasks"]
    figures = answer["results"][name]
    keys = [key for key in figures if "," in key and "_stderr," not in key]
    # Sorting is stable: without either it is the task's first metric.
    keys.sort(key=lambda key: (not key.startswith("acc_norm,"), not key.startswith("acc,")))
    if not keys and members.get(name):
        return [row for member in members[name] for row in task_results(member, answers)]
    if not keys:
        raise CMoEError(f"the harness has no figure for the task {name}.")
    key, leaves = keys[0], [name]
    while any(members.get(leaf) for leaf in leaves):
        leaves = [each for leaf in leaves for each in members.get(leaf) or [leaf]]
    counts = {answer["n-shot"][leaf] for leaf in leaves}
    values, errors = [], []
    for each in answers:
        values.append(float(each["results"][name][key]))
        error = each["results"][name].get(key.replace(",", "_stderr,", 1))
        # The harness says "N/A" for an error that it does not know.
        errors.append(error if isinstance(error, float) else None)
    row = TaskResult(
        task=name,
        metric=key.removesuffix(",none"),
        few_shot=counts.pop() if len(counts) == 1 else None,
        documents=sum(answer["n-samples"][leaf]["effective"] for leaf in leaves),
        value=values[0],
        stderr=errors[0],
        baseline_value=values[1] if len(values) > 1 else None,
        baseline_stderr=errors[1] if len(errors) > 1 else None,
    )
    return [row]


@contextmanager
def harness() -> Iterator[list[logging.LogRecord]]:
    """Keep standard output clean, and progress bars to a terminal; yield what the harness logs.

    It warns of every request that it truncates: too many to print.
    """
    log, messages = logging.getLogger("lm_eval"), BufferingHandler(sys.maxsize)
    with ExitStack() as stack:
        stack.callback(setattr, log, "propagate", log.propagate)
        stack.callback(log.removeHandler, messages)
        log.propagate = False
        log.addHandler(messages)
        if not sys.stderr.isatty():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stderr(nowhere))
        stack.enter_context(redirect_stdout(sys.stderr))
        yield messages.buffer


def _reason(error: Exception) -> str:
    """Return what went wrong, in one line."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
