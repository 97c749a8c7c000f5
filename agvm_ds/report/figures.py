"""How modules are drawn over updates: one line style a module, told apart in print and by any eye."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from agvm_ds.report.measures import read_measures

SMOOTH = 11
"""Measured updates whose running median the plot draws."""
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours, told apart with any colour vision; black is the anchor's."""
DASHES = ("solid", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))


def plot_modules(agvm_jsonl: Path, out: Path, title: str = "AGVM: modules of the detector") -> Path | None:
    """Draw variance and scale factor of each module over updates into the PNG ``out``; None if nothing was measured."""
    measures = read_measures(agvm_jsonl)
    if measures is None:
        return None
    figure = empty_figure(9, 6.6)
    above, below = figure.subplots(2, 1, sharex=True)
    for axes, columns in ((above, measures.variance), (below, measures.scale_factor)):
        for place, name in enumerate(measures.modules):
            draw_module(axes, measures.updates, columns[name], style(place), faint=axes is above)
    dress(above, "gradient variance Φ\n(0 agree, 1 unrelated, no unit)")
    dress(below, "scale factor μ\n(multiplies the learning rate)")
    below.set_xlabel("update")
    above.set_title(f"dots: single measures · lines: running median of {SMOOTH}", loc="left", fontsize=9, color="0.35")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    module_legend(figure, measures.modules, measures.anchor)
    return save(figure, out)


def style(place: int) -> dict[str, Any]:
    """Line style of the module at ``place``; 0 is the anchor's."""
    if place == 0:
        return {"color": "black", "linewidth": 2.6, "linestyle": "solid", "zorder": 2}
    other = place - 1
    return {"color": PALETTE[other % len(PALETTE)], "linewidth": 1.8, "linestyle": DASHES[1:][other % 4], "zorder": 3}


def draw_module(axes: Axes, updates: list[int], values: list[float], style: dict[str, Any], faint: bool) -> None:
    """One module's line; with ``faint`` each value is a faint dot and the line is their running median."""
    if faint:
        axes.plot(updates, values, ".", color=style["color"], alpha=0.25, markersize=4, markeredgewidth=0, zorder=1)
        values = running_median(values)
    marker = "o" if len(updates) == 1 else None
    axes.plot(updates, values, marker=marker, **style)


def running_median(values: list[float]) -> list[float]:
    """Over SMOOTH values around each, those that are undefined left out."""
    half = SMOOTH // 2
    windows = ([v for v in values[max(0, i - half) : i + half + 1] if not math.isnan(v)] for i in range(len(values)))
    return [statistics.median(window) if window else math.nan for window in windows]


def dress(axes: Axes, label: str) -> None:
    """A label, and as few lines as can be."""
    axes.set_ylabel(label)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)


def empty_figure(width: float, height: float) -> Figure:
    """A figure in inches that draws without a display."""
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def module_legend(figure: Figure, modules: list[str], anchor: str) -> None:
    """Below the figure; ``modules`` has the anchor first."""
    handles = [Line2D([], [], **style(place)) for place in range(len(modules))]
    labels = [f"{name} (anchor)" if name == anchor else name for name in modules]
    figure.legend(handles, labels, loc="outside lower left", ncols=5, frameon=False, handlelength=3.5, fontsize=9)


def save(figure: Figure, out: Path) -> Path:
    """Write a PNG; its folder is made."""
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")
    return out
