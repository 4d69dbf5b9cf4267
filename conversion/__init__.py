# SPDX-License-Identifier: Apache-2.0
"""Turn dense language models into CMoE models, and measure them."""

from .convert import Conversion, Settings, convert
from .demo import Demo, demo
from .errors import CMoEError, RequestError
from .evaluate import Evaluation, evaluate
from .recipe import RECIPES, Recipe

__all__ = [
    "RECIPES",
    "CMoEError",
    "Conversion",
    "Demo",
    "Evaluation",
    "Recipe",
    "RequestError",
    "Settings",
    "convert",
    "demo",
    "evaluate",
]
