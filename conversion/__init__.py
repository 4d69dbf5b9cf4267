# SPDX-License-Identifier: Apache-2.0
"""Turn dense language models into CMoE models, and measure them."""

from .carve.recipe import RECIPES, Recipe
from .carve.settings import Settings
from .convert import Conversion, convert, resume
from .demo import Demo, demo
from .errors import CMoEError, RequestError
from .measure.benchmark import Benchmark, benchmark
from .measure.engine import EngineBenchmark, benchmark_gguf
from .measure.evaluate import Evaluation, evaluate
from .measure.tasks import TaskEvaluation, TaskResult, evaluate_tasks
from .plan import Plan, plan
from .share.export import Export, export
from .share.gguf_file import GGUFFile, export_gguf
from .share.publish import Publication, publish
from .share.serve import serve
from .share.upgrade import Upgrade, upgrade
from .share.verify import Verification, verify
from .show.report import Report, report
from .show.sweep import Sweep, sweep
from .tune.recover import Recovery, recover, resume_recovery
from .tune.settings import Tuning

__all__ = [
    "RECIPES",
    "Benchmark",
    "CMoEError",
    "Conversion",
    "Demo",
    "EngineBenchmark",
    "Evaluation",
    "Export",
    "GGUFFile",
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
    "benchmark_gguf",
    "convert",
    "demo",
    "evaluate",
    "evaluate_tasks",
    "export",
    "export_gguf",
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
