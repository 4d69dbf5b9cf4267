# SPDX-License-Identifier: Apache-2.0
"""The README's picture, drawn from the rows of its table: perplexity against what runs."""

import math
import re
from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 820, 330, 60, 20, 330, 48
COLOURS = ("#0072b2", "#cc7000", "#7f7f7f", "#009e73", "#cc79a7")
TICKS = (10, 20, 50, 100, 200, 500, 1000, 2000)


def number(cell: Any) -> float:
    """Return the number in a cell, in bold or not."""
    return float(str(cell).strip("* ").replace(",", ""))


def svg(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Draw rows, on a logarithmic scale, against the shares that the columns name."""
    shares = [float(re.findall(r"\d+", f"{name} 100")[0]) for name in columns[1:]]
    values = [[number(cell) for cell in row[1:]] for row in rows]
    low, high = min(map(min, values)) * 0.92, max(map(max, values)) * 1.15

    def x(share: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (share - min(shares)) / (100 - min(shares))

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * math.log(high / value) / math.log(high / low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="system-ui, sans-serif" font-size="13">',
        "<title>Perplexity against the share of the FFN neurons that run</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    for tick in TICKS:
        if low <= tick <= high:
            parts.append(
                f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
                f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>'
            )
    for share in shares:
        parts.append(
            f'<text x="{x(share):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">'
            f"{share:.0f} %</text>"
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"FFN neurons that run for a token</text>"
    )
    for line, colour in zip(values, COLOURS, strict=False):
        points = sorted(zip(shares, line, strict=True))
        path = " ".join(f"{x(share):.1f},{y(value):.1f}" for share, value in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>'
        )
        parts += [
            f'<circle cx="{x(share):.1f}" cy="{y(value):.1f}" r="3.5" fill="{colour}"/>'
            for share, value in points
        ]
    for at, (row, colour) in enumerate(zip(rows, COLOURS, strict=False)):
        name = re.sub(r"[*`]|WikiText-2 perplexity, |the same, ", "", str(row[0]))
        above = TOP + 14 + 22 * at
        parts.append(
            f'<path d="M{WIDTH - RIGHT + 16} {above - 4}h22" stroke="{colour}" stroke-width="2.5"/>'
            f'<text x="{WIDTH - RIGHT + 44}" y="{above}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"
