# SPDX-License-Identifier: Apache-2.0
"""Quality and speed over shapes and budgets, with the dense model and static pruning beside."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..carve.settings import CarvingOptions, Settings, absolute
from ..carve.shape import Shape
from ..convert import convert, resume
from ..device import device_name, find_device, versions
from ..errors import CMoEError, RequestError, check_at_least
from ..folder.json_utils import as_json
from ..folder.layerwise import WorkFolder
from ..folder.paths import check_apart, remove, replace_file, resolved
from ..measure.benchmark import benchmark
from ..measure.evaluate import evaluate
from ..measure.timing import Comparison
from ..options import narrowed, with_options
from ..plan import carved_as
from ..source.checkpoint import Source, open_source
from ..source.loading import load_config, window_length
from ..source.texts import absolute_text
from .figures import SPEEDS as SPEEDS
from .figures import check_drawing, plot_sweep

GRID = ("S1A1E8", "S1A3E8", "S2A2E8", "S1A5E8", "S3A3E8")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One carved model of a sweep: what is asked for, and what that is."""

    asked: dict[str, Any]
    """A budget, or a shape and the layers that stay dense; fields of `Settings`."""
    shape: Shape
    dense_layers: tuple[int, ...]
    activation_ratio: float

    @property
    def name(self) -> str:
        """Return the name of its folder, and of its figures in `sweep.json`."""
        if "budget" in self.asked:
            return f"budget-{self.asked['budget']:g}"
        dense = "".join(f"-{layer}" for layer in self.dense_layers)
        return f"{self.shape.notation}-dense{dense}" if dense else self.shape.notation


@dataclass(frozen=True, kw_only=True)
class Row:
    """One shape: what it is worth and what it costs."""

    notation: str
    budget: float | None
    """What was asked for in place of the shape."""
    static: bool
    """Static pruning: as many neurons, always the same ones."""
    activation_ratio: float
    perplexity: float
    router_oracle_agreement: float | None
    router_chance_agreement: float | None
    speedup: dict[str, float]
    """Speed relative to dense by the names of `SPEEDS`; empty if it was not measured."""
    roofline_speedup: dict[str, float]
    seconds: float
    """Of the conversion."""

    @property
    def label(self) -> str:
        """Return its name in tables and plots."""
        if self.static:
            return f"{self.notation}, static"
        return self.notation if self.budget is None else f"budget {self.budget:g}: {self.notation}"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The whole curve; the keys of `cmoe sweep --json`."""

    output: str
    model: str
    dense_perplexity: float
    rows: list[Row]
    device: str
    versions: dict[str, str]


@dataclass(frozen=True)
class SweepOptions(CarvingOptions):
    """The options of `sweep`. Evaluation windows are as long as those of the calibration."""

    model: str | Path
    """Folder or Hub id of a dense model."""
    output: str | Path | None = None
    """Folder for the results; default the model's name with `-sweep`."""
    _: KW_ONLY
    grid: Sequence[str] = GRID
    """Shapes in the paper's notation and budgets (0.5); static pruning is added."""
    text: str | Path = "wikitext2"
    """Text to measure perplexity on."""
    rounds: int = 7
    """Timed runs of each point, dense and carved in turn; 0 for none."""
    keep: bool = False
    """Keep the carved models beside the results."""
    overwrite: bool = False
    """Forget what an earlier sweep measured."""


@with_options(SweepOptions)
def sweep(options: SweepOptions) -> Sweep:
    """Convert, evaluate and time every model of a grid, and static pruning at equal activation.

    What is measured is written to `output` row by row: interrupted, or called with a larger grid,
    it measures only what is missing. The rows are in `sweep.json` and `sweep.md`, drawn in
    `sweep.png`.

    Raises:
        RequestError: The request cannot be satisfied; nothing was started.
        CMoEError: The work failed; the finished rows are kept.
    """
    check_at_least(0, rounds=options.rounds)
    options = replace(
        options,
        model=absolute(options.model),
        calibration=absolute_text(options.calibration),
        text=absolute_text(options.text),
    )
    check_drawing("a sweep")
    where = device_name(find_device(options.device))
    source = open_source(options.model)
    if options.rounds and source.architecture.router is not None:
        raise RequestError("the speed of a carved MoE cannot be measured yet: pass --rounds 0.")
    window_length(source.config, options.sequence_length)
    cases = with_static(source, options)
    store = Store(options.output or f"{source.name.rpartition('/')[2]}-sweep", options, where)
    for case in tqdm([None, *cases], desc="sweep", unit="model", disable=None):
        key = "dense" if case is None else case.name
        if key not in store.measured:
            folder = store.folder / key
            store.add(key, figures_of(options, case, folder))
            if not options.keep:
                shutil.rmtree(folder, ignore_errors=True)
    result = Sweep(
        output=str(store.folder),
        model=source.name,
        dense_perplexity=store.measured["dense"]["perplexity"],
        rows=[Row(**store.measured[case.name]) for case in cases],
        device=where,
        versions=versions(),
    )
    (store.folder / "sweep.md").write_text(as_markdown(result), encoding="utf-8")
    plot_sweep(result, store.folder / "sweep.png")
    return result


def with_static(source: Source, options: SweepOptions) -> list[Case]:
    """Return the grid, each model once, with static pruning at every activation ratio."""

    def case_of(**asked: Any) -> Case:
        settings = Settings(**asked, **vars(narrowed(options, CarvingOptions)))
        config, shape = carved_as(source, settings)
        dense = tuple(config.dense_layers or ())
        ratio = config.activation_ratio
        return Case(asked=asked, shape=shape, dense_layers=dense, activation_ratio=ratio)

    found: dict[str, Case] = {}
    for text in options.grid:
        case = case_of(**asked_by(text))
        ratios = [other.activation_ratio for other in found.values() if not other.shape.active]
        found[case.name] = case
        if case.shape.active and case.activation_ratio not in ratios:
            running = case.shape.shared + case.shape.active
            pruned = asdict(Shape(running, 0, case.shape.experts))
            static = case_of(**pruned, dense_layers=case.dense_layers)
            found[static.name] = static
    return sorted(found.values(), key=lambda case: (case.activation_ratio, case.shape.shared))


def asked_by(text: str) -> dict[str, Any]:
    """Return the fields of `Settings` for a budget, `0.5`, or a shape, `S3A3E8`."""
    try:
        return {"budget": float(text)}
    except ValueError:
        return asdict(Shape.parse(text))


def figures_of(options: SweepOptions, case: Case | None, folder: Path) -> dict[str, Any]:
    """Return the perplexity of the dense model; or, carved into `folder`, the `Row` of a case."""
    on: dict[str, Any] = {"text": options.text, "device": options.device}
    on["sequence_length"] = options.sequence_length
    if case is None:
        return {"perplexity": evaluate(options.model, dtype=options.dtype, **on).perplexity}
    seconds = carve_into(folder, options, case)
    quality = evaluate(folder, **on)
    speed: dict[str, Comparison] = {}
    if options.rounds:
        prompt = window_length(load_config(folder, False), None, usual=256)
        sizes: dict[str, Any] = {"tokens": [1], "prefill": [prompt], "batch": [1], "context": 64}
        sizes |= {"rounds": options.rounds, "device": options.device}
        timed = benchmark(folder, baseline=options.model, **sizes)
        speed = {name: getattr(timed, name)[0] for name in SPEEDS}
    return {
        "notation": case.shape.notation,
        "budget": case.asked.get("budget"),
        "static": case.shape.active == 0,
        "activation_ratio": case.activation_ratio,
        "perplexity": quality.perplexity,
        "router_oracle_agreement": quality.router_oracle_agreement,
        "router_chance_agreement": quality.router_chance_agreement,
        "speedup": {name: point.speedup for name, point in speed.items()},
        "roofline_speedup": {name: point.roofline_speedup for name, point in speed.items()},
        "seconds": seconds,
    }


def carve_into(folder: Path, options: SweepOptions, case: Case) -> float:
    """Convert, or resume that; return the seconds that it took."""
    if (folder / "conversion.json").is_file():  # interrupted while it was measured
        return json.loads((folder / "conversion.json").read_text())["result"]["seconds"]
    if (WorkFolder(folder).private / "settings.json").is_file():
        return resume(folder).seconds
    carving = vars(narrowed(options, CarvingOptions))
    return convert(options.model, folder, **case.asked, **carving).seconds


class Store:
    """`sweep.json`: the protocol and what is measured, written after every row."""

    def __init__(self, folder: str | Path, options: SweepOptions, device: str) -> None:
        self.folder = resolved(folder)
        self.file = self.folder / "sweep.json"
        read = {"the model": options.model, "the text to measure on": options.text}
        check_apart(self.folder, {**read, "the calibration text": options.calibration})
        self.protocol = {name: getattr(options, name) for name in ("model", "text", "rounds")}
        # Figures of other versions or of another machine cannot stand in the same table.
        conditions = {"device": device, "versions": versions()}
        self.protocol |= vars(narrowed(options, CarvingOptions)) | conditions
        self.measured: dict[str, dict[str, Any]] = {}
        if self.file.is_file():
            if options.overwrite:
                remove(self.folder.iterdir())
            else:
                self._read()
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise RequestError(
                f"{self.folder.name} exists already and holds no sweep: choose another folder."
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"cannot create {self.folder.name}: {error.strerror}.") from error

    def _read(self) -> None:
        try:
            stored = json.loads(self.file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CMoEError(f"{self.file} is damaged: start again with --overwrite.") from error
        for name, value in self.protocol.items():
            if stored["protocol"].get(name) != value:
                raise RequestError(
                    f"{name} was {stored['protocol'].get(name)!r} in the sweep that "
                    f"{self.folder.name} holds and is {value!r} now: choose another folder, or "
                    "start again with --overwrite."
                )
        self.measured = stored["measured"]

    def add(self, key: str, figures: dict[str, Any]) -> None:
        """Keep the figures of one model."""
        self.measured[key] = figures
        content = {"protocol": self.protocol, "measured": self.measured}
        replace_file(self.file, as_json(content))


def as_markdown(result: Sweep) -> str:
    """Return the rows as a table."""
    lines = [
        ["shape", "runs", "perplexity", "oracle agreement (chance)", *SPEEDS.values()],
        ["---"] * (4 + len(SPEEDS)),
        ["dense", "100 %", f"{result.dense_perplexity:.2f}", "", *["1"] * len(SPEEDS)],
    ]
    for row in result.rows:
        own, chance = row.router_oracle_agreement, row.router_chance_agreement
        speeds = [f"{row.speedup[it]:.2f} ({row.roofline_speedup[it]:.2f})" for it in row.speedup]
        agreement = "" if own is None else f"{own:.3f} ({chance:.3f})"
        figures = [f"{100 * row.activation_ratio:.1f} %", f"{row.perplexity:.2f}", agreement]
        lines.append([row.label, *figures, *(speeds or [""] * len(SPEEDS))])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    made = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    return (
        f"# {result.model}: quality and speed\n\n{table}\n\nSpeed is relative to dense, in "
        f"brackets the roofline's. {result.device}; {made}.\n"
    )
