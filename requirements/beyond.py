# SPDX-License-Identifier: Apache-2.0
"""Print which packages have releases beyond the bounds of pyproject.toml, for `make newest`.

python requirements/beyond.py [NAME ...]
"""

import re
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def bounded() -> list[Requirement]:
    """Return the requirements that have an upper bound, those of the extras included."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    found = [Requirement(line) for lines in lists for line in lines]
    return [it for it in found if any(bound.operator == "<" for bound in it.specifier)]


def newest(name: str) -> str | None:
    """Return the newest release on the package index, or None if that cannot be found out."""
    command = [sys.executable, "-m", "pip", "index", "versions", name, "--retries", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    found = re.match(rf"{re.escape(name)} \((.+)\)", done.stdout)
    return found[1] if found else None


def main() -> None:
    """Print one line."""
    wanted = [it for it in bounded() if it.name in sys.argv[1:] or not sys.argv[1:]]
    with ThreadPoolExecutor(4) as pool:
        versions = list(pool.map(newest, [it.name for it in wanted]))
    pairs = list(zip(wanted, versions, strict=True))
    beyond = [f"{it.name} {last}" for it, last in pairs if last and last not in it.specifier]
    unknown = [it.name for it, last in pairs if last is None]
    print(f"Newer than the bounds of pyproject.toml: {', '.join(beyond) or 'nothing'}.", end="")
    if unknown:
        print(f" Not known, because the index does not answer: {', '.join(unknown)}.", end="")
    print()


if __name__ == "__main__":
    main()
