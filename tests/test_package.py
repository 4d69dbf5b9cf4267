# SPDX-License-Identifier: Apache-2.0
"""A wheel, installed elsewhere, works in full."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cmoe_hf.conversion.embedded import CALIBRATION

ROOT = Path(__file__).parent.parent


WITHOUT_POSIX = """
import builtins, importlib, os, pkgutil, sys
MISSING = {"fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "termios", "tty"}
import_it = builtins.__import__
def refuse(name, space=None, *arguments, **options):
    if name in MISSING and (space or {}).get("__name__", "").startswith("cmoe"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return import_it(name, space, *arguments, **options)
builtins.__import__ = refuse
import pathlib
is_file, exists = pathlib.Path.is_file, pathlib.Path.exists
hide = lambda ask: lambda path: not str(path).startswith("/proc/") and ask(path)
pathlib.Path.is_file, pathlib.Path.exists = hide(is_file), hide(exists)
vars(os).pop("posix_fallocate")
import cmoe_cli, cmoe_hf
for found in pkgutil.walk_packages(cmoe_hf.__path__, "cmoe_hf."):
    if not found.name.endswith(("__main__", "triton_cmoe")):  # which needs Triton
        importlib.import_module(found.name)
import psutil
class Process(psutil.Process):  # as on Windows
    def memory_info(self):
        memory = super().memory_info()
        memory = type("pmem", (), {"rss": memory.rss, "peak_wset": memory.rss})
        return memory
psutil.Process = Process
from cmoe_hf.conversion import convert, evaluate
model, out, text = sys.argv[1:]
options = dict(budget=0.5, experts=8, calibration=text, samples=4, sequence_length=64)
print(convert(model, out, **options).peak_memory_bytes)
evaluate(out, text=text, sequence_length=64, windows=2)
"""


def test_nothing_needs_what_only_posix_has(dense, tmp_path):
    """Linux in the place of Windows: our code may not import what is missing there."""
    command = [sys.executable, "-c", WITHOUT_POSIX, dense, tmp_path / "out", CALIBRATION]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10**7
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_no_function_is_called_that_only_posix_has():
    posix_only = re.compile(
        r"\bos\.(fork|get[eu]*[ug]id|killpg|sched_|statvfs|setsid|mkfifo|getloadavg|uname|nice|chown)"
        r"|\bsignal\.SIG(KILL|HUP|USR|ALRM)|\bpreexec_fn|\bget_context\(.fork"
    )
    sources = [path for name in ("src", "conversion") for path in (ROOT / name).rglob("*.py")]
    found = [path for path in sources if posix_only.search(path.read_text(encoding="utf-8"))]
    assert sources and not found


@pytest.mark.thorough
def test_the_wheel_carries_everything_and_runs_the_demo(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    build = tmp_path / "source"
    build.mkdir()
    for name in ("src", "conversion", "pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        (build / name).symlink_to(ROOT / name)
    subprocess.run([*pip, "wheel", *options, "-w", tmp_path, build], check=True, timeout=300)
    [wheel] = tmp_path.glob("cmoe_hf-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "cmoe_cli.py",
        "cmoe_hf/modeling_cmoe.py",
        "cmoe_hf/configuration_cmoe.py",
        "cmoe_hf/triton_cmoe.py",
        "cmoe_hf/py.typed",
        "cmoe_hf/conversion/assets/llama-pydoc/model.safetensors",
        "cmoe_hf/conversion/assets/calibration.txt",
        "cmoe_hf/conversion/assets/report.html",
        "cmoe_hf/conversion/cli/__init__.py",
    } <= names
    assert not any(name.startswith(("conversion/", "tests/")) for name in names)

    site = tmp_path / "site"
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", site, wheel],
        check=True,
        timeout=300,
    )
    script = (
        "import cmoe_cli, cmoe_hf, sys; from cmoe_hf.conversion import cli;"
        f"assert cmoe_hf.__file__.startswith({str(site)!r}), cmoe_hf.__file__;"
        f"assert cmoe_cli.__file__.startswith({str(site)!r}), cmoe_cli.__file__;"
        f"assert cli.__file__.startswith({str(site)!r}), cli.__file__;"
        "sys.argv = ['cmoe', 'demo', 'out', '--json']; cmoe_cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert {"dense_perplexity", "carved_perplexity", "activation_ratio", "output"} <= printed.keys()
    assert printed["dense_perplexity"] < printed["carved_perplexity"] < 100
    assert (tmp_path / "out" / "modeling_cmoe.py").is_file()
