# SPDX-License-Identifier: Apache-2.0
"""JSON as the standard has it, for everything that is printed or written."""

import json
import math
from typing import Any

from ..errors import CMoEError


def to_json(content: Any, **layout: Any) -> str:
    """Plain data as JSON. Raises `CMoEError` for a NaN or infinity, which JSON does not know: null
    in its place would look like a figure that was never asked for."""
    try:
        return json.dumps(content, allow_nan=False, **layout)
    except ValueError:
        found = _not_finite(content, "")
        if found is None:
            raise
        key, value = found
        raise CMoEError(
            f"{key} is {value}, not a finite number, and is not passed on as one: the model "
            "overflows or its weights are damaged."
        ) from None


def as_json(content: Any) -> str:
    """Return plain data as it is written to files."""
    return to_json(content, indent=2, ensure_ascii=False) + "\n"


def _not_finite(value: Any, key: str) -> tuple[str, float] | None:
    """Where the first number is that is not finite, and which."""
    if isinstance(value, float) and not math.isfinite(value):
        return key, value
    parts: Any = ()
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    found = (_not_finite(part, f"{key}.{name}" if key else str(name)) for name, part in parts)
    return next(filter(None, found), None)
