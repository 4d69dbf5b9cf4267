# SPDX-License-Identifier: Apache-2.0
"""Run the commands of the tables again and say which figures changed: `make tables`.

A table may have `rerun`, described in CONTRIBUTING.md: commands whose last line is a JSON object,
and where in it the figures of which cells are. They run in build/tables, where `--data` links the
models and texts that they name; what lacks one is left out, and said.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

from tables import ROOT, grid, names, read

FIGURES = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
WORK = ROOT / "build" / "tables"


class Spread(NamedTuple):
    """A printed figure and what may come out instead of it."""

    figure: float
    low: float
    high: float

    @classmethod
    def of(cls, cell: object, within: float) -> "Spread":
        """Read `1.54 (1.44-2.21)`; without a range, a figure may differ by a share `within`."""
        numbers = [float(it.replace(",", "")) for it in FIGURES.findall(str(cell))]
        if len(numbers) >= 3:
            return cls(*numbers[:3])
        return cls(numbers[0], numbers[0] * (1 - within), numbers[0] * (1 + within))


def at(found: Any, path: str) -> float:
    """Return the number at a path such as `decode.0.speedup`."""

    def step(value: Any, key: str) -> Any:
        return value[int(key)] if isinstance(value, list) else value[key]

    return float(reduce(step, path.split("."), found))


def run(command: str) -> Any:
    """Run a command in `WORK` and return the JSON object that it ends with."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, shell=True, cwd=WORK, env=os.environ | {"PATH": path}, stdout=subprocess.PIPE
    )
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def compared(name: str, table: dict[str, Any]) -> Iterator[list[object]]:
    """Run what a table says, and yield a row for each figure."""
    rerun = table["rerun"]
    if absent := [it for it in rerun.get("needs", []) if not (WORK / it).exists()]:
        yield [name, f"left out: {', '.join(absent)} not in DATA", "", "", ""]
        return
    for step in rerun["steps"]:
        start = time.perf_counter()
        print(f"{name}: {step['command']}", file=sys.stderr, flush=True)
        try:
            found = run(step["command"])
        except (RuntimeError, ValueError, IndexError) as error:
            yield [name, f"failed: {step['command']}: {error}", "", "", "**changed**"]
            continue
        print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        for row, column, path in step["cells"]:
            cell, value = table["rows"][row][column], at(found, path)
            spread = Spread.of(cell, rerun["within"])
            verdict = "same" if spread.low <= value <= spread.high else "**changed**"
            where = f"{table['rows'][row][0]}, {table['columns'][column]}"
            yield [name, where.replace("*", ""), cell, f"{value:.4g}", verdict]


def main() -> None:
    """Compare the tables that can be run again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="folder of the models and texts")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="tables; default all that can")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    for path in arguments.data.expanduser().absolute().iterdir() if arguments.data else ():
        if not (WORK / path.name).exists():
            (WORK / path.name).symlink_to(path)
    rows = []
    for name in arguments.only or names():
        if "rerun" in (table := read(name)):
            rows += compared(name, table)
    columns = ["table", "figure", "printed", "now", ""]
    page = grid({"columns": columns, "rows": rows}) + "\n"
    (WORK / "tables.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
