# SPDX-License-Identifier: Apache-2.0
"""Turn dense language models into CMoE models, and measure them."""

from .benchmark import Benchmark, benchmark
from .convert import Conversion, convert, resume
from .demo import Demo, demo
from .errors import CMoEError, RequestError
from .evaluate import Evaluation, evaluate
from .export import Export, export
from .plan import Plan, plan
from .publish import Publication, publish
from .recipe import RECIPES, Recipe
from .recover import Recovery, recover, resume_recovery
from .report import Report, report
from .serve import serve
from .settings import Options, Settings
from .sweep import Sweep, sweep
from .tasks import TaskEvaluation, TaskResult, evaluate_tasks
from .tuning import Tuning
from .upgrade import Upgrade, upgrade
from .verify import Verification, verify

__all__ = [
    "RECIPES",
    "Benchmark",
    "CMoEError",
    "Conversion",
    "Demo",
    "Evaluation",
    "Export",
    "Options",
    "Plan",
    "Publication",
    "Recipe",
    "Recovery",
    "Report",
    "RequestError",
    "Settings",
    "Sweep",
    "TaskEvaluation",
    "TaskResult",
    "Tuning",
    "Upgrade",
    "Verification",
    "benchmark",
    "convert",
    "demo",
    "evaluate",
    "evaluate_tasks",
    "export",
    "plan",
    "publish",
    "recover",
    "report",
    "resume",
    "resume_recovery",
    "serve",
    "sweep",
    "upgrade",
    "verify",
]
