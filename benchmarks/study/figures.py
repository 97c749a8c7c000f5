"""The study's figures, from its lines, in the line styles of the run reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agvm_ds.report.figures import dress, empty_figure, module_legend, save, style
from benchmarks.study.launch import BINS
from benchmarks.study.plan import Cell, Study
from benchmarks.study.protocol import BATCHES, LAYERWISE, METHODS, METHODS_AT, MODULATED
from benchmarks.study.tables import scores, title


def draw(study: Study, folder: Path) -> list[str]:
    """Write the figures for which there are lines; their names."""
    figures = {
        "accuracy.png": accuracy(study),
        **{f"variance_{base}.png": variances(study, base) for base in MODULATED},
        **{f"curves_{base}.png": curves(study, base) for base in MODULATED},
    }
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    for name, figure in drawn.items():
        save(figure, folder / name)
    return list(drawn)


def accuracy(study: Study) -> Figure | None:
    """mAP of the reported seeds by batch, a panel a base: mean and standard deviation."""
    figure = empty_figure(10, 4.4)
    panels = figure.subplots(1, len(MODULATED), sharex=True, sharey=True)
    at = sorted(METHODS_AT)
    for axes, base in zip(panels, MODULATED, strict=True):
        rows = [*((base, method) for method in METHODS), (LAYERWISE[base], "plain")]
        for place, (kind, method) in enumerate(rows):
            points = [(batch, scores(study, study.reported(Cell(kind, method, batch)))) for batch in at]
            points = [(batch, values) for batch, values in points if len(values) > 1]
            if points:
                batches, means, spreads = zip(*[(b, fmean(v), stdev(v)) for b, v in points], strict=True)
                # beside each other, not on top
                shifted = [batch * 1.03 ** (place - 1.5) for batch in batches]
                look = style(place) | ({} if len(points) == len(at) else {"linestyle": "none"})  # no line over a gap
                axes.errorbar(shifted, means, spreads, capsize=3, marker="o", label=title(kind, method), **look)
        axes.set(xscale="log", xlim=(at[0] / 1.25, at[-1] * 1.25))
        axes.set_xticks(at, [str(batch) for batch in at])
        axes.minorticks_off()
        axes.set(xlabel="batch, images", title=base)
        dress(axes, "mAP on report" if axes is panels[0] else "")
        if axes.has_data():
            axes.legend(frameon=False, handlelength=3.5, fontsize=9)
    panels[0].set_ylim(bottom=0)  # of both, once both are drawn
    return figure if any(axes.has_data() for axes in panels) else None


def variances(study: Study, base: str) -> Figure | None:
    """Gradient variance by module over training: plain above, with AGVM below, scale factors under it; a column a batch."""
    rows = (
        ("plain", "variance", "variance Φ, plain"),
        ("pairwise", "variance", "variance Φ, AGVM pairwise"),
        ("pairwise", "scale_factor", "scale factor μ"),
    )
    batches = _known(study, base, ("plain", "pairwise"))
    if not batches:
        return None
    figure, panels = _columns_of(batches, len(rows), base)
    names: list[str] = []
    for column, batch in enumerate(batches):
        for row, (method, quantity, label) in enumerate(rows):
            line = study.chosen_line(Cell(base, method, batch))
            if line is not None:
                names = list(line["measures"])
                _by_module(panels[row][column], line["measures"], quantity)
            dress(panels[row][column], label if column == 0 else "")
        panels[-1][column].set_xlabel("share of the run")
    module_legend(figure, names, names[0])
    return figure


def _known(study: Study, base: str, methods: Sequence[str]) -> list[int]:
    """The batches at which one of the methods has a chosen rate."""
    return [batch for batch in BATCHES if any(study.chosen(Cell(base, method, batch)) for method in methods)]


def _columns_of(batches: Sequence[int], rows: int, base: str) -> tuple[Figure, Any]:
    """A figure with a column a batch, and its panels."""
    figure = empty_figure(2 + 2.75 * len(batches), 1 + 2.4 * rows)
    panels = figure.subplots(rows, len(batches), sharex="col", sharey="row", squeeze=False)
    for axes, batch in zip(panels[0], batches, strict=True):
        axes.set_title(f"batch {batch}")
    figure.suptitle(f"{base}, seed 0 at the chosen rate", x=0.01, ha="left", fontweight="bold")
    return figure, panels


def _by_module(axes: Axes, measures: Mapping[str, Mapping[str, Sequence[Any]]], quantity: str) -> None:
    shares = (np.arange(BINS) + 0.5) / BINS
    for place, columns in enumerate(measures.values()):
        values = [float("nan") if value is None else float(value) for value in columns[quantity]]
        axes.plot(shares, values, **style(place))


def curves(study: Study, base: str) -> Figure | None:
    """mAP and loss over updates, each method with seed 0 at its chosen rate; a column a batch."""
    batches = _known(study, base, METHODS)
    if not batches:
        return None
    figure, panels = _columns_of(batches, 2, base)
    for column, batch in enumerate(batches):
        above, below = panels[0][column], panels[1][column]
        for place, method in enumerate(METHODS):
            line = study.chosen_line(Cell(base, method, batch))
            if line is not None:
                points = [(point["update"], point["report"]) for point in line["curve"]]
                above.plot(*_columns(points), marker="o", clip_on=False, label=title(base, method), **style(place))
                below.plot(*_columns(line["loss"]), **style(place))
        below.set_xlabel("update")
        dress(above, "mAP on report" if column == 0 else "")
        dress(below, "loss" if column == 0 else "")
    labelled = max((axes.get_legend_handles_labels() for axes in panels[0]), key=lambda pair: len(pair[0]))
    figure.legend(*labelled, loc="outside lower left", ncols=4, frameon=False, handlelength=3.5, fontsize=9)
    return figure


def _columns(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
