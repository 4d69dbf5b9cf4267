# SPDX-License-Identifier: Apache-2.0
"""A wheel, installed elsewhere, works in full."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


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
