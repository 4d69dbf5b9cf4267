# SPDX-License-Identifier: Apache-2.0
"""JSON as the standard has it, for everything that is printed or written."""

import json
import math
from typing import Any

from ..errors import CMoEError


def to_json(content: Any, **layout: Any) -> str:
    """Return plain data as JSON. Raises `CMoEError` for NaN and infinity, which JSON lacks."""
    try:
        return json.dumps(content, allow_nan=False, **layout)
    except ValueError:
        found = _not_finite(content, "")
        if found is None:
            raise
        raise CMoEError(
            f"{found[0]} is {found[1]}, not a finite number, and is not passed on as one: the "
            "model overflows or its weights are damaged."
        ) from None


def as_json(content: Any) -> str:
    """Return plain data as it is written to files."""
    return to_json(content, indent=2, ensure_ascii=False) + "\n"


def _not_finite(value: Any, key: str) -> tuple[str, float] | None:
    """Return where the first number is that is not finite, and which."""
    if isinstance(value, float) and not math.isfinite(value):
        return key, value
    parts = dict(enumerate(value)) if isinstance(value, list | tuple) else value
    for name, part in parts.items() if isinstance(parts, dict) else ():
        if found := _not_finite(part, f"{key}.{name}".lstrip(".")):
            return found
    return None
