# SPDX-License-Identifier: Apache-2.0
"""Figures as files: two for a model's card, the plots of a benchmark and a sweep.

They need the extra `[report]`.
"""

import importlib.util
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError, missing
from ..measure.benchmark import Benchmark
from ..measure.timing import LABELS

if TYPE_CHECKING:
    from .sweep import Sweep

BLUE, INK = "#0072b2", "#1b2530"
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a929b",
    "axes.labelcolor": "#55606d",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e0ded7",
    "text.color": INK,
    "legend.frameon": False,
    "font.size": 9,
    "savefig.dpi": 120,
}
SPEEDS = {"ffn": "FFN, 1 token", "prefill": "prefill", "decode": "decoding 1 sequence"}
"""What a sweep times."""
CARD_FIGURES = {
    "expert-load.png": "share of the tokens that run each expert",
    "reconstruction-error.png": "error of the FFN output of each layer",
}


def check_drawing(what: str) -> None:
    """Raise `RequestError` if `what`, for example "a report", cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise missing(f"{what} needs matplotlib", "report")


def draw_figures(data: dict[str, Any]) -> dict[str, bytes]:
    """Draw a report's data for the model's card: PNG files by name, of what is known only."""
    import matplotlib
    from matplotlib.figure import Figure

    name = f"{data['model']['name']} {data['model']['notation']}"
    layers, files = data["layers"], {}
    for file, title in CARD_FIGURES.items():
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a name may have letters that the font has not
            width = min(14, max(6, 1.5 + 0.3 * len(layers)))
            figure = Figure(figsize=(width, 3.4), layout="tight")
            errors = [layer["relative_output_error"] for layer in layers]
            if file == "expert-load.png" and layers[0]["loads"]:
                expert_load(figure, layers)
            elif file != "expert-load.png" and None not in errors:
                reconstruction_error(figure, errors)
            else:
                continue
            # A name may have a dollar sign.
            figure.suptitle(f"{name}: {title}", fontsize=11, parse_math=False)
            figure.savefig(buffer := io.BytesIO(), metadata={"Software": "cmoe-hf"})
            files[file] = buffer.getvalue()
    return files


def reconstruction_error(figure: Any, errors: Sequence[float]) -> None:
    """Draw the relative output error of every layer."""
    axis = figure.subplots()
    axis.bar(range(len(errors)), errors, 0.7, color=BLUE)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set(xlabel="layer", ylabel="relative error")


def expert_load(figure: Any, layers: Sequence[dict[str, Any]]) -> None:
    """Draw the share of the tokens that run each expert."""
    loads = [layer["loads"] for layer in layers]
    figure.set_figheight(min(9, max(3.4, 1.4 + 0.27 * len(loads[0]))))
    axis = figure.subplots()
    # An expert that always runs would leave the others pale.
    routed = [
        load
        for layer in layers
        for expert, load in enumerate(layer["loads"])
        if expert not in layer["pinned"]
    ]
    look = {"aspect": "auto", "cmap": "Blues", "vmin": 0, "vmax": max(routed, default=1.0)}
    image = axis.imshow(list(zip(*loads, strict=True)), **look)
    axis.grid(False)
    for side in (axis.xaxis, axis.yaxis):
        side.get_major_locator().set_params(integer=True)
    axis.set(xlabel="layer", ylabel="routed expert")
    figure.colorbar(image, format=lambda value, _: f"{value:.0%}", label="tokens")


def check_plot(path: str | Path) -> None:
    """Raise `RequestError` if nothing could be drawn into this file."""
    check_drawing("a plot")
    path = Path(path)
    if path.suffix not in (".png", ".svg", ".pdf") or not path.parent.is_dir():
        raise RequestError(f"cannot draw into {path}: give a .png, .svg or .pdf in a folder.")


def plot(result: Benchmark, path: str | Path) -> None:
    """Draw the speedups of a benchmark beside the rooflines."""
    check_plot(path)
    from matplotlib.figure import Figure

    drawn = [name for name in LABELS if getattr(result, name)]
    figure = Figure(figsize=(4 * len(drawn), 3.6), layout="constrained")
    axes = figure.subplots(1, len(drawn), squeeze=False)
    for axis, name in zip(axes[0], drawn, strict=True):
        points = getattr(result, name)
        x = [point.batch if name == "decode" else point.tokens for point in points]
        low = [point.speedup - point.speedup_low for point in points]
        high = [point.speedup_high - point.speedup for point in points]
        speedups = [point.speedup for point in points]
        axis.errorbar(x, speedups, [low, high], marker="o", label="measured")
        axis.plot(x, [point.roofline_speedup for point in points], "k--", label="roofline")
        axis.axhline(1, color="grey", linewidth=0.8, label="dense")
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [str(size) for size in x])
        axis.set_ylim(bottom=0)
        axis.set(title=LABELS[name], xlabel="sequences" if name == "decode" else "tokens")
    axes[0][0].set_ylabel("speed relative to dense")
    axes[0][0].legend()
    title = f"{result.model} {result.notation}, {result.dtype}, {result.device}"
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, dpi=150)


def plot_sweep(result: "Sweep", path: Path) -> None:
    """Draw perplexity, and speed if it was measured, against the activation ratio.

    Carved models are points, static pruning and the dense model lines.
    """
    import matplotlib
    from matplotlib.figure import Figure

    carved = [row for row in result.rows if not row.static]
    static = [row for row in result.rows if row.static]
    panels = 2 if any(row.speedup for row in result.rows) else 1

    def draw(axis: Any, rows: Any, values: list[float], *style: str, **look: Any) -> None:
        axis.plot([row.activation_ratio for row in rows], values, *style, **look)

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5 * panels, 4), layout="tight")
        quality, *speed = figure.subplots(1, panels, squeeze=False)[0]
        draw(quality, static, [row.perplexity for row in static], "s--", label="static pruning")
        draw(quality, carved, [row.perplexity for row in carved], "o", label="carved")
        for row in carved:
            place = (row.activation_ratio, row.perplexity)
            quality.annotate(row.label, place, (6, 4), textcoords="offset points", fontsize=7)
        quality.axhline(result.dense_perplexity, color="black", linewidth=1, label="dense")
        quality.margins(y=0.1)
        quality.set_ylabel("perplexity")
        for axis in speed:
            for index, (name, label) in enumerate(SPEEDS.items()):
                look = {"color": f"C{index}", "markersize": 5}
                draw(axis, carved, [row.speedup[name] for row in carved], "o", label=label, **look)
                values = [row.speedup[name] for row in static]
                draw(axis, static, values, "s--", label=f"{label}, static", **look)
            axis.axhline(1, color="black", linewidth=1, label="dense")
            axis.set_ylim(bottom=0)
            axis.set_ylabel("speed relative to dense")
        for axis in (quality, *speed):
            axis.set_xlabel("activation ratio: share of the FFN neurons that run")
            axis.set_xlim(0, 1)
            axis.legend()
        figure.suptitle(f"{result.model}, {result.device}", parse_math=False)
        figure.savefig(path, dpi=150, metadata={"Software": None})
