# SPDX-License-Identifier: Apache-2.0
"""What has been released beyond the bounds of pyproject.toml is noticed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "requirements" / "beyond.py"


@pytest.mark.thorough
def test_releases_beyond_the_bounds_are_named(tmp_path):
    for name, version in {"torch": "99.0", "tqdm": "4.67.1"}.items():
        (tmp_path / name).mkdir()
        wheel = f"{name}-{version}-py3-none-any.whl"
        (tmp_path / name / wheel).touch()
        (tmp_path / name / "index.html").write_text(f'<a href="{wheel}">{wheel}</a>')
    index = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": tmp_path.as_uri()}
    index |= {"PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": "", "PIP_NO_INDEX": ""}
    done = subprocess.run(
        [sys.executable, SCRIPT, "torch", "tqdm", "accelerate"],
        env={**{k: v for k, v in os.environ.items() if not k.startswith("PIP_")}, **index},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == (
        "Newer than the bounds of pyproject.toml: torch 99.0."
        " Not known, because the index does not answer: accelerate.\n"
    )
