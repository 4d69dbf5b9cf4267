# SPDX-License-Identifier: Apache-2.0
"""Turn dense language models into CMoE models, and measure them."""

from .benchmark import Benchmark, benchmark
from .convert import Conversion, convert, resume
from .demo import Demo, demo
from .errors import CMoEError, RequestError
from .evaluate import Evaluation, evaluate
from .plan import Plan, plan
from .recipe import RECIPES, Recipe
from .settings import Options, Settings

__all__ = [
    "RECIPES",
    "Benchmark",
    "CMoEError",
    "Conversion",
    "Demo",
    "Evaluation",
    "Options",
    "Plan",
    "Recipe",
    "RequestError",
    "Settings",
    "benchmark",
    "convert",
    "demo",
    "evaluate",
    "plan",
    "resume",
]
