# SPDX-License-Identifier: Apache-2.0
"""Pico models, an isolated cache and a loopback Hub: nothing here touches the network."""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from hub import LoopbackHub

# huggingface_hub reads these once, when it is imported.
_HUB = LoopbackHub()
_CACHE = Path(tempfile.mkdtemp(prefix="cmoe-tests-"))
os.environ.update(
    HF_ENDPOINT=_HUB.url,
    HF_HOME=str(_CACHE),
    HF_MODULES_CACHE=str(_CACHE / "modules"),
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    PYTHONPATH=str(Path(__file__).parent),  # for the process that starts others
    CMOE_TUNE="0",
    OMP_NUM_THREADS="1",  # also in child processes: thread counts change the last bits
)
os.environ.pop("HF_TOKEN", None)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from families import SHORT, pico_config  # noqa: E402
from filelock import FileLock  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from cmoe_hf.conversion import convert  # noqa: E402
from cmoe_hf.conversion.embedded import CALIBRATION, HELD_OUT, MODEL  # noqa: E402
from cmoe_hf.conversion.source.hub import register_family  # noqa: E402


def pytest_sessionfinish() -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def hub() -> LoopbackHub:
    """The server that HF_ENDPOINT names."""
    return _HUB


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Build a folder once for the same key, whichever worker needs it. Read only: that is checked.

    `root` holds all of them.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    root /= "once"

    def state(folder: Path) -> str:
        stats = [(path.name, path.stat()) for path in sorted(folder.rglob("*"))]
        return repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])

    def make(build: Callable[[Path], object], name: str, *key: object) -> Path:
        place = root / hashlib.sha256(repr((name, *key)).encode()).hexdigest()[:16]
        place.mkdir(parents=True, exist_ok=True)
        folder, built = place / name, place / "built"
        with FileLock(place / "lock"):
            if not built.exists():
                shutil.rmtree(folder, ignore_errors=True)
                with torch.random.fork_rng():
                    build(folder)
                built.write_text(state(folder))
        assert built.read_text() == state(folder), f"a test has written into {folder}: copy it"
        return folder

    make.root = root
    return make


@pytest.fixture(scope="session")
def make_dense(once: Callable[..., Path]) -> Callable[..., Path]:
    """Write a random dense pico model with a tokenizer; return its folder. Read only."""

    def make(family: str = "llama-2", **changes: object) -> Path:
        def build(folder: Path) -> None:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(pico_config(family, **changes))
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:  # larger weights than the default: the FFN must matter
                    torch.nn.init.normal_(parameter, std=0.2)
                elif name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.1)
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)

        return once(build, family, sorted(changes.items()))

    return make


@pytest.fixture(scope="session")
def own_dense(
    make_dense: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The same, as a folder that a test may damage."""

    def make(family: str = "llama-2", **changes: object) -> Path:
        folder = make_dense(family, **changes)
        return Path(shutil.copytree(folder, tmp_path_factory.mktemp("own") / family))

    return make


@pytest.fixture(scope="session")
def dense(make_dense: Callable[..., Path]) -> Path:
    """The pico model most tests use. Read only."""
    return make_dense()


@pytest.fixture
def dense_copy(dense: Path, tmp_path: Path) -> Path:
    """A pico model that a test may damage."""
    return Path(shutil.copytree(dense, tmp_path / "copy"))


@pytest.fixture
def sharded(dense: Path, tmp_path: Path) -> Path:
    """Other weights than those of `dense`, in shards."""
    folder = Path(shutil.copytree(dense, tmp_path / "sharded"))
    (folder / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(dense)
    for parameter in model.parameters():
        parameter.data *= 1.5
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture(scope="session")
def carve(
    once: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Convert with few tokens; return the new folder. Read only, if the source is."""

    def run(model: Path, notation: tuple[int, int, int] = (2, 2, 8), **options: object) -> Path:
        shared, active, experts = notation
        settings = {"calibration": CALIBRATION, "samples": 4, "sequence_length": 64, **options}

        def build(output: Path) -> None:
            convert(model, output, shared=shared, active=active, experts=experts, **settings)

        if model == MODEL or once.root in Path(model).parents:
            output = once(build, "out", model, notation, sorted(settings.items()))
            register_family(output)  # another process may have carved it
            return output
        output = tmp_path_factory.mktemp("carved") / "out"
        build(output)
        return output

    return run


@pytest.fixture(scope="session")
def carved(dense: Path, carve: Callable[..., Path]) -> Path:
    """A carved pico model, S2A2E8. Read only."""
    return carve(dense)


@pytest.fixture(scope="session")
def token_ids() -> torch.Tensor:
    """Two rows of 32 tokens."""
    return torch.randint(2, 1024, (2, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def embedded() -> Path:
    """The trained model that the package carries."""
    return MODEL


@pytest.fixture(scope="session")
def calibration_text() -> Path:
    """Text that the embedded default was trained on."""
    return CALIBRATION


@pytest.fixture(scope="session")
def held_out() -> Path:
    """Text that the embedded default was not trained on."""
    return HELD_OUT


@pytest.fixture(scope="session")
def short_text() -> Path:
    """The beginning of that, for what only has to be measured."""
    return SHORT


@pytest.fixture
def tensors() -> Callable[[Path], dict[str, torch.Tensor]]:
    """Read all tensors of a repository."""

    def read(folder: Path) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            found.update(load_file(shard))
        return found

    return read


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """Change fields of a folder's config.json."""

    def edit(folder: Path, **changes: object) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


@pytest.fixture
def no_leftovers(tmp_path: Path) -> Iterator[Path]:
    """An output path; afterwards neither it nor a partial one may exist."""
    output = tmp_path / "output" / "carved"
    yield output
    assert not list(tmp_path.glob("output/*"))


@pytest.fixture(scope="session")
def processes() -> BaseContext:
    """Starts processes in which the package is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable"])
    return context
