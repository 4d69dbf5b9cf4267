# SPDX-License-Identifier: Apache-2.0
"""What commands print. Nothing is markup: names may hold brackets and colons."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table


class Printed(NamedTuple):
    """What a command prints."""

    result: Any
    """A dataclass, for --json."""
    shown: Sequence[Table | str]
    """Tables and lines, for people."""
    status: int = 0


def show(*parts: Table | str) -> None:
    """Print tables and lines. Only tables are fitted to the terminal: a line may be a path."""
    console = Console(markup=False, emoji=False, highlight=False)
    for part in parts:
        (print if isinstance(part, str) else console.print)(part)


def table(title: str, *columns: str, caption: str | None = None) -> Table:
    """Return a table without rows."""
    return Table(*columns, title=title, title_justify="left", caption=caption)


def facts(title: str, rows: Mapping[str, str]) -> Table:
    """Return a table of names and values."""
    made = table(title)
    made.show_header = False
    for row in rows.items():
        made.add_row(*row)
    return made


def agreement(own: float | None, chance: float | None) -> str:
    """Return in words how often a router agrees with the oracle."""
    return "does not route" if own is None else f"{own:.1%} of tokens (chance {chance:.1%})"
