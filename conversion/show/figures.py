# SPDX-License-Identifier: Apache-2.0
"""The figures of a report as PNG files, drawn from the data of its page. Needs `[report]`."""

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import RequestError, missing
from ..measure.benchmark import Benchmark
from ..measure.timing import LABELS

BLUE, ORANGE, GREY, INK = "#0072b2", "#cc7000", "#b9bfc6", "#1b2530"
HUES = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#f0e442", "#7f7f7f")
"""Okabe and Ito's, told apart by the colour-blind too; experts beyond eight repeat them."""
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a929b",
    "axes.labelcolor": "#55606d",
    "axes.titlesize": 10,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e0ded7",
    "xtick.color": "#55606d",
    "ytick.color": "#55606d",
    "text.color": INK,
    "legend.frameon": False,
    "font.size": 9,
    "savefig.dpi": 120,
}
SMALL_MULTIPLES = 6
"""Layers that a figure of single layers shows, from the first to the last."""

Data = dict[str, Any]


def check_drawing(what: str) -> None:
    """Raises `RequestError` if `what`, for example "a report", cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise missing(f"{what} needs matplotlib", "report")


def draw_figures(data: Data, folder: Path) -> list[str]:
    """Draw every figure for which there is something to show; return the names of the files."""
    import matplotlib
    from matplotlib.figure import Figure

    missing = set()
    if any(layer["relative_output_error"] is None for layer in data["layers"]):
        missing.add(reconstruction_error)
    if not data["model"]["active"]:
        missing |= {router_agreement, load_imbalance, expert_load, routing_overview}
    chosen = {file: draw for file, draw in FILES.items() if draw not in missing}
    for file, draw in chosen.items():
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a name may have letters that the font has not
            figure = Figure(figsize=(width_for(len(data["layers"])), 3.4), layout="constrained")
            title = draw(figure, data)
            name = f"{data['model']['name']} {data['model']['notation']}"
            # A name may have a dollar sign.
            figure.suptitle(f"{name}: {title}", fontsize=11, parse_math=False)
            figure.savefig(folder / file, metadata={"Software": "cmoe-hf"})
    return list(chosen)


def width_for(columns: int, *, each: float = 0.3) -> float:
    """Inches of a figure with that many columns."""
    return min(14.0, max(6.0, 1.5 + each * columns))


def over_layers(
    figure: Any,
    series: dict[str, tuple[str, list[float]]],
    label: str,
    *,
    stacked: bool = False,
    shares: bool = True,
) -> Any:
    """Columns for every layer, by the name of the series its colour and values."""
    from matplotlib.ticker import PercentFormatter

    axis = figure.subplots()
    if shares:
        axis.yaxis.set_major_formatter(PercentFormatter(1))
    floor = [0.0] * len(next(iter(series.values()))[1])
    width = 0.7 if stacked else 0.7 / len(series)
    for index, (name, (colour, values)) in enumerate(series.items()):
        shift = 0 if stacked else (index - (len(series) - 1) / 2) * width
        places = [layer + shift for layer in range(len(values))]
        axis.bar(places, values, width, floor if stacked else None, color=colour, label=name)
        floor = [low + value for low, value in zip(floor, values, strict=True)]
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlim(-0.6, len(floor) - 0.4)
    axis.set_xlabel("layer")
    axis.set_ylabel(label)
    return axis


def legend_below(figure: Any, axis: Any) -> None:
    """One line of names outside the axes: bars may fill all of them."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)


def as_table(axis: Any, across: str, down: str) -> None:
    """Whole numbers on both axes, which are named, and no grid."""
    axis.grid(False)
    for side in (axis.xaxis, axis.yaxis):
        side.get_major_locator().set_params(integer=True)
    axis.set_xlabel(across)
    axis.set_ylabel(down)


def column(data: Data, name: str) -> list[Any]:
    """One figure of every layer."""
    return [layer[name] for layer in data["layers"]]


def reconstruction_error(figure: Any, data: Data) -> str:
    """Relative output error of every layer, from the conversion."""
    errors = column(data, "relative_output_error")
    over_layers(figure, {"": (BLUE, errors)}, "relative error")
    return "error of the FFN output on calibration tokens"


def mass(figure: Any, data: Data) -> str:
    """Who holds which share of sum |h|."""
    names = {"shared": ("shared expert", BLUE), "ran": ("routed, ran", ORANGE)}
    names["idle"] = ("routed, idle", GREY)
    masses = column(data, "mass")
    series = {
        label: (colour, [one[name] for one in masses])
        for name, (label, colour) in names.items()
        if any(one[name] for one in masses)
    }
    axis = over_layers(figure, series, "share of sum |h|", stacked=True)
    axis.set_ylim(0, 1)
    legend_below(figure, axis)
    return "who carries the activation"


def router_agreement(figure: Any, data: Data) -> str:
    """How often the router picks the oracle's experts, beside chance."""
    axis = over_layers(figure, {"router": (ORANGE, column(data, "oracle_agreement"))}, "tokens")
    chance = data["model"]["chance"]
    axis.axhline(chance, color=INK, linestyle="--", label=f"chance ({chance:.1%})")
    axis.set_ylim(0, 1)
    legend_below(figure, axis)
    return "tokens for which the router picks the oracle's experts"


def load_imbalance(figure: Any, data: Data) -> str:
    """Coefficient of variation of the loads, with the balance bias and without."""
    own, without = column(data, "imbalance"), column(data, "imbalance_unbiased")
    series = {"with the balance bias": (ORANGE, own)}
    if own != without:
        series["without it"] = (GREY, without)
    axis = over_layers(figure, series, "coefficient of variation", shares=False)
    if own != without:
        legend_below(figure, axis)
    return "imbalance of the experts' loads"


def expert_load(figure: Any, data: Data) -> str:
    """Share of the tokens that run each expert, layers across and experts down."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import PercentFormatter

    loads = list(zip(*column(data, "loads"), strict=True))
    figure.set_figheight(min(9.0, max(3.4, 1.4 + 0.27 * len(loads))))
    axis = figure.subplots()
    blues = LinearSegmentedColormap.from_list("blues", ["#ffffff", "#6db1e0", BLUE])
    unpinned = [
        load
        for layer in data["layers"]
        for expert, load in enumerate(layer["loads"])
        if expert not in layer["pinned"]
    ]
    most = max(unpinned, default=1.0)
    image = axis.imshow(loads, aspect="auto", cmap=blues, vmin=0, vmax=most)
    if len(loads) <= 16 and len(loads[0]) <= 32:
        for expert, row in enumerate(loads):
            for layer, load in enumerate(row):
                white = load > 0.75 * most
                text = {"color": "white" if white else INK, "fontsize": 8}
                axis.text(layer, expert, f"{100 * load:.0f}", ha="center", va="center", **text)
    as_table(axis, "layer", "routed expert")
    bar = figure.colorbar(image, format=PercentFormatter(1, decimals=0), pad=0.02)
    bar.set_label("tokens")
    bar.outline.set_visible(False)
    return "share of the tokens that run each expert, in %"


def some_layers(figure: Any, data: Data, x_label: str, y_label: str) -> list[tuple[Any, Data]]:
    """Axes for a few layers from the first to the last, and their figures."""
    layers = data["layers"]
    last, shown = len(layers) - 1, min(SMALL_MULTIPLES, len(layers))
    indices = sorted({round(last * step / max(shown - 1, 1)) for step in range(shown)})
    across = min(3, len(indices))
    down = -(-len(indices) // across)
    figure.set_size_inches(3.4 * across + 1, 2.4 * down + 1)
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for unused in axes[len(indices) :]:
        unused.set_visible(False)
    for place, (index, axis) in enumerate(zip(indices, axes, strict=False)):
        axis.set_title(f"layer {index}")
        if place + across >= len(indices):
            axis.set_xlabel(x_label)
        if place % across == 0:
            axis.set_ylabel(y_label)
    return [(axis, layers[index]) for index, axis in zip(indices, axes, strict=False)]


def groups(values: Data) -> list[tuple[str, str, list[int], int]]:
    """Name, colour, counts and what is outside, of shared and of routed neurons."""
    both = [
        ("shared neurons", BLUE, values["shared"], values["outside_shared"]),
        ("routed neurons", ORANGE, values["routed"], values["outside_routed"]),
    ]
    return [group for group in both if any(group[2]) or group[3]]


def activation_rate(figure: Any, data: Data) -> str:
    """Histograms of the activation rate; neurons that never fire are named in the title."""
    label = "activation rate μ (share of tokens)"
    for axis, layer in some_layers(figure, data, label, "neurons"):
        rates = layer["activation_rates"]
        floor: Sequence[float] = [0] * len(rates["shared"])
        for name, colour, counts, _ in groups(rates):
            stairs = [low + count for low, count in zip(floor, counts, strict=True)]
            axis.stairs(stairs, rates["edges"], baseline=floor, fill=True, color=colour, label=name)
            floor = stairs
        never = rates["outside_shared"] + rates["outside_routed"]
        axis.set_title(f"{axis.get_title()}; {never:,} never fire")
        axis.set_xscale("log")
        axis.minorticks_off()
    legend_below(figure, figure.axes[0])
    return f"how often neurons are among a token's {data['marked']} largest |h|"


def hidden_histograms(figure: Any, data: Data) -> str:
    """Distributions of h, shared and routed neurons each for themselves."""
    for axis, layer in some_layers(figure, data, "hidden value h", "share of the values"):
        values = layer["hidden_values"]
        for name, colour, counts, outside in groups(values):
            whole = sum(counts) + outside
            shares = [count / whole for count in counts]
            axis.stairs(shares, values["edges"], fill=True, alpha=0.25, color=colour)
            axis.stairs(shares, values["edges"], color=colour, label=name)
        axis.set_yscale("log")
        axis.minorticks_off()
    legend_below(figure, figure.axes[0])
    return "hidden values"


def expert_colour(expert: int) -> tuple[float, ...]:
    """The colour of an expert, paler with every round through `HUES`."""
    from matplotlib.colors import to_rgb

    share = 0.75 * 0.8 ** (expert // len(HUES))
    return tuple(1 - share * (1 - part) for part in to_rgb(HUES[expert % len(HUES)]))


def routing_overview(figure: Any, data: Data) -> str:
    """First chosen expert of each token of the sample, tokens across and layers down."""
    first = [[list_K[0] for list_K in layer["experts"]] for layer in data["sample"]["layers"]]
    layers, tokens = len(first), len(first[0])
    height = min(12.0, max(2.2, 1.2 + 0.2 * layers))
    figure.set_size_inches(width_for(tokens, each=0.2), height)
    axis = figure.subplots()
    axis.imshow([[expert_colour(expert) for expert in row] for row in first], aspect="auto")
    if tokens * layers <= 1500:
        for layer, row in enumerate(first):
            for token, expert in enumerate(row):
                axis.text(token, layer, expert, ha="center", va="center", fontsize=6.5)
    as_table(axis, "token of the sample", "layer")
    return "first chosen expert of each token"


FILES: dict[str, Callable[[Any, Data], str]] = {
    "routing-overview.png": routing_overview,
    "reconstruction-error.png": reconstruction_error,
    "router-agreement.png": router_agreement,
    "imbalance.png": load_imbalance,
    "mass.png": mass,
    "expert-load.png": expert_load,
    "activation-rate.png": activation_rate,
    "hidden-values.png": hidden_histograms,
}
"""Who draws what; each returns its title. The names are those of the page's figures."""


def check_plot(path: str | Path) -> None:
    """Raises `RequestError` if nothing could be drawn into this file."""
    check_drawing("a plot")
    path = Path(path)
    if path.suffix not in (".png", ".svg", ".pdf") or not path.parent.is_dir():
        raise RequestError(f"cannot draw into {path}: give a .png, .svg or .pdf in a folder.")


def plot(result: Benchmark, path: str | Path) -> None:
    """Draw the speedups beside the rooflines. Needs the extra `[report]`."""
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
        axis.errorbar(
            x, [point.speedup for point in points], [low, high], marker="o", label="measured"
        )
        axis.plot(x, [point.roofline_speedup for point in points], "k--", label="roofline")
        axis.axhline(1, color="grey", linewidth=0.8, label="dense")
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [str(size) for size in x])
        axis.set_ylim(bottom=0)
        axis.set_title(LABELS[name])
        axis.set_xlabel("sequences" if name == "decode" else "tokens")
    axes[0][0].set_ylabel("speed relative to dense")
    axes[0][0].legend()
    figure.suptitle(f"{result.model} {result.notation}, {result.dtype}, {result.device}")
    figure.savefig(path, dpi=150)
