# SPDX-License-Identifier: Apache-2.0
"""The README's pictures, drawn from rows of a table: one line each, against its columns."""

import math
import re
from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 820, 350, 60, 40, 330, 48
COLOURS = ("#0072b2", "#cc7000", "#7f7f7f", "#009e73", "#cc79a7")
STEPS = (1, 2, 5)
FIGURE = re.compile(r"(\d[\d.]*)( ?%| ?[kM]\b)?")


def number(cell: Any) -> float:
    """Return the number in a cell, in bold or not."""
    return float(str(cell).strip("* ").replace(",", ""))


def ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Return round numbers between two."""
    if logarithmic:
        tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        several = [step * 10.0**ten for ten in tens for step in STEPS]
    else:
        ten = 10.0 ** math.floor(math.log10((high - low) / 3))
        step = max(step * ten for step in STEPS if step * ten <= (high - low) / 3)
        several = [step * count for count in range(math.ceil(high / step) + 1)]
    return [tick for tick in several if low <= tick <= high]


def svg(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    title: str,
    below: str,
    logarithmic: bool = False,
) -> str:
    """Draw rows against the numbers in the names of the columns (100 % where there is none).

    Args:
        columns: Names; the first one belongs to the names of the rows.
        rows: Name and numbers of each line.
        title: What the rows are.
        below: What the columns are.
        logarithmic: Whether the numbers of the rows are on a logarithmic scale, else from 0.
    """
    found = [FIGURE.search(f"{name} 100 %") for name in columns[1:]]
    places = [(float(it[1]), it[1] + (it[2] or "")) for it in found if it is not None]
    values = [[number(cell) for cell in row[1:]] for row in rows]
    low = min(map(min, values)) * 0.92 if logarithmic else 0.0
    high = max(map(max, values)) * (1.15 if logarithmic else 1.05)
    first, last = min(places)[0], max(places)[0]

    def x(place: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (place - first) / (last - first)

    def y(value: float) -> float:
        share = math.log(high / value) / math.log(high / low) if logarithmic else 1 - value / high
        return TOP + (HEIGHT - TOP - BOTTOM) * share

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f"<title>{title}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="20" font-weight="600">{title}</text>',
    ]
    for tick in ticks(low, high, logarithmic):
        parts.append(
            f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
            f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for place, name in places:
        parts.append(
            f'<text x="{x(place):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">'
            f"{name}</text>"
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{below}</text>"
    )
    for line, colour in zip(values, COLOURS, strict=False):
        points = sorted(zip((place for place, _ in places), line, strict=True))
        path = " ".join(f"{x(place):.1f},{y(value):.1f}" for place, value in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>'
        )
        parts += [
            f'<circle cx="{x(place):.1f}" cy="{y(value):.1f}" r="3.5" fill="{colour}"/>'
            for place, value in points
        ]
    for at, (row, colour) in enumerate(zip(rows, COLOURS, strict=False)):
        name = re.sub(r"[*`]|WikiText-2 perplexity, |the same, ", "", str(row[0]))
        above = TOP + 14 + 22 * at
        parts.append(
            f'<path d="M{WIDTH - RIGHT + 16} {above - 4}h22" stroke="{colour}" stroke-width="2.5"/>'
            f'<text x="{WIDTH - RIGHT + 44}" y="{above}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"
