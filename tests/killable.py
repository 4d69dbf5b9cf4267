# SPDX-License-Identifier: Apache-2.0
"""What runs in processes of their own: some are killed, some are ranks that share a model."""

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import accelerate
import torch
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from cmoe_hf.conversion import Tuning, convert, recover, resume, resume_recovery, sweep
from cmoe_hf.conversion.folder.layerwise import WorkFolder

_watching: list[Callable[[str], None]] = []


def _tell(event: str, arguments: tuple) -> None:
    """Tell of files that are renamed or opened to be written, under their new names."""
    if not _watching or event not in ("os.rename", "open"):
        return
    path = arguments[1] if event == "os.rename" else arguments[0]
    if event == "os.rename" or (isinstance(path, str | Path) and "+" in str(arguments[1])):
        _watching[-1](Path(os.fsdecode(path)).name)


sys.addaudithook(_tell)


@contextmanager
def watched(look: Callable[[str], None]) -> Iterator[None]:
    """Call `look` with the name of every file, just before it is written."""
    _watching.append(look)
    try:
        yield
    finally:
        _watching.remove(look)


@contextmanager
def interrupted_at(name: str, count: int = 1) -> Iterator[None]:
    """Press Ctrl-C when a file of this name is written for the `count`-th time."""
    seen = []

    def interrupt(written: str) -> None:
        seen.extend([written] * (written == name))
        if written == name and len(seen) == count:
            raise KeyboardInterrupt

    with watched(interrupt):
        yield
    assert len(seen) >= count, f"{name} was written {len(seen)} times"


def die_at_something_new(seen, arguments):
    """Convert, or go on, and die (as of kill -9) at a file that `seen`, a file, does not name."""

    def die(name):
        if name not in seen.read_text().split():
            seen.write_text(f"{seen.read_text()} {name}")
            os.kill(os.getpid(), signal.SIGKILL)

    with watched(die):
        go_on(arguments)


def go_on(arguments):
    """Convert, or resume if that was begun."""
    if (Path(f"{arguments['output']}.partial") / "work" / "settings.json").is_file():
        resume(arguments["output"])
    else:
        convert(**arguments)


def hold(begun, output):
    """Be at work in a folder until killed."""
    with WorkFolder.create(output, {}, overwrite=False):
        begun.set()
        while True:
            begun.wait(1)


def run_out_of_space(queue, arguments):
    """Convert on a disk that is full after the first layer; report what is raised."""
    written = []

    def fill(name):
        written.extend([name] * (name == "manifest.json"))
        if len(written) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))

    try:
        with watched(fill):
            convert(**arguments)
    except Exception as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        queue.put((type(error).__name__, str(error), getattr(error, "__notes__", [])))


def recover_it(arguments, tuning):
    """Recover until killed."""
    recover(**arguments, tuning=Tuning(**tuning))


def sweep_it(arguments):
    """Sweep until killed."""
    sweep(**arguments)


def be_rank(rank, rendezvous, jobs, results):
    """Be one of two ranks: load each model split by each layout, and run it by every backend.

    `jobs` are rows of a name, a folder, the fields of a `DistributedConfig` and the backends. What
    happened is saved in `results`, a folder: outputs, shapes of what this rank holds, an error.
    """
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    for name, folder, layout, backends in jobs:
        try:
            found = run_split(folder, layout, backends, results / f"{name}-saved")
        except ValueError as error:
            found = {"error": str(error)}
        torch.save(found, results / f"{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


@torch.no_grad()
def run_split(folder, layout, backends, saved):
    """Logits, greedy tokens and local shapes of a model of which this rank holds a part."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(**layout)
    ).eval()
    found = {"shapes": {}, "default": model.config._experts_implementation}
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        found["shapes"][name] = tuple(local.shape)
    for backend in backends:
        model.set_experts_implementation(backend)
        found[backend] = outputs(model)
    model.save_pretrained(saved)
    return found


@torch.no_grad()
def outputs(model):
    """Logits of a prompt, and what is generated after it."""
    ids = torch.randint(2, 1024, (2, 24), generator=torch.Generator().manual_seed(1))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    return model(ids).logits, model.generate(ids, **options)


def recover_as_rank(rank, rendezvous, environment, output, arguments, tuning):
    """Be one of two ranks of a recovery, begun with `arguments` and `tuning` or resumed.

    accelerate shards models on accelerators only, and does without on CPUs: call these by another
    name.
    """
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(ACCELERATE_USE_CPU="true", MASTER_ADDR="localhost")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2
    )
    begin = accelerate.PartialState.__init__

    def begin_by_another_name(state, *rest, **options):
        begin(state, *rest, **options)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU

    with patch.object(accelerate.PartialState, "__init__", begin_by_another_name):
        if arguments is None:
            resume_recovery(output)
        else:
            recover(output=output, **arguments, tuning=Tuning(**tuning))
