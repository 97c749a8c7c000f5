"""The study's figures, from its lines. Colours are Okabe and Ito's, and no two lines differ by colour alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

from benchmarks.study.launch import BINS
from benchmarks.study.plan import Cell, Study
from benchmarks.study.protocol import ALONE, BATCHES, METHODS, MODULATED
from benchmarks.study.tables import scores, title

STYLES: list[dict[str, Any]] = [
    {"color": "#000000", "linestyle": "-", "marker": "o"},
    {"color": "#0072B2", "linestyle": "--", "marker": "s"},
    {"color": "#D55E00", "linestyle": "-.", "marker": "^"},
    {"color": "#009E73", "linestyle": ":", "marker": "D"},
    {"color": "#CC79A7", "linestyle": (0, (5, 1)), "marker": "v"},
]


def draw(study: Study, folder: Path) -> list[str]:
    """Write the figures for which there are lines; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    figures: list[tuple[str, Any]] = [("accuracy.png", accuracy(study))]
    figures += [(f"variance_{base}.png", variances(study, base)) for base in MODULATED]
    figures += [(f"curves_{base}.png", curves(study, base)) for base in MODULATED]
    for name, figure in figures:
        if figure is not None:
            figure.savefig(folder / name, dpi=110, metadata={"Software": None})
            plt.close(figure)
            names.append(name)
    return names


def accuracy(study: Study) -> Any:
    """MAP of the reported seeds by batch, a panel a base: mean and standard deviation."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    drawn = False
    for axis, base in zip(axes, MODULATED, strict=True):
        rows = [(base, method) for method in METHODS] + ([(name, "plain") for name in ALONE] if base == "AdamW" else [])
        for (kind, method), style in zip(rows, STYLES * 2, strict=False):
            points = [(batch, scores(study, study.reported(Cell(kind, method, batch)))) for batch in BATCHES]
            points = [(batch, values) for batch, values in points if len(values) > 1]
            if points:
                batches, means, deviations = zip(*[(b, fmean(v), stdev(v)) for b, v in points], strict=True)
                axis.errorbar(batches, means, deviations, capsize=3, label=title(kind, method), **style)
                drawn = True
        axis.set(xlabel="batch, images", title=base, xscale="log", xticks=BATCHES)
        axis.set_xticks(BATCHES, [str(batch) for batch in BATCHES], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend()
    axes[0].set_ylabel("mAP on report, seeds 1 to 4")
    return figure if drawn else _none(figure)


def _none(figure: Any) -> None:
    plt.close(figure)


def variances(study: Study, base: str) -> Any:
    """Gradient variance by module over training: plain above, with AGVM below, scale factors under it; a column a batch."""
    figure, axes = plt.subplots(3, len(BATCHES), figsize=(13, 8), sharex=True, sharey="row", layout="constrained")
    rows = [("plain", "variance"), ("pairwise", "variance"), ("pairwise", "scale_factor")]
    drawn = False
    for column, batch in enumerate(BATCHES):
        for row, (method, quantity) in enumerate(rows):
            chosen = study.chosen(Cell(base, method, batch))
            if chosen is not None:
                _by_module(axes[row][column], study.known[chosen.key]["measures"], quantity)
                drawn = True
        axes[0][column].set_title(f"batch {batch}")
        axes[-1][column].set_xlabel("share of the run")
    for axis, label in zip(axes[:, 0], ("variance, plain", "variance, AGVM pairwise", "scale factor"), strict=True):
        axis.set_ylabel(label)
    if not drawn:
        return _none(figure)
    handles = next(axis for axis in axes.flat if axis.has_data()).get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4)
    figure.suptitle(f"{base}, seed 0 at the chosen rate")
    return figure


def _by_module(axis: Any, measures: dict[str, dict[str, Sequence[Any]]], quantity: str) -> None:
    shares = [(k + 0.5) / BINS for k in range(BINS)]
    for (name, columns), style in zip(measures.items(), STYLES, strict=False):
        values = [float("nan") if value is None else float(value) for value in columns[quantity]]
        axis.plot(shares, values, label=name, markersize=3, **style)
    axis.grid(alpha=0.3)


def curves(study: Study, base: str) -> Any:
    """mAP and loss over updates, plain and with AGVM, seed 0 at the chosen rate; a column a batch."""
    figure, axes = plt.subplots(2, len(BATCHES), figsize=(13, 6), sharey="row", layout="constrained")
    drawn = False
    for column, batch in enumerate(BATCHES):
        for method, style in zip(METHODS, STYLES, strict=False):
            chosen = study.chosen(Cell(base, method, batch))
            if chosen is None:
                continue
            line, drawn = study.known[chosen.key], True
            axes[0][column].plot(
                [p["update"] for p in line["curve"]], [p["report"] for p in line["curve"]], label=method, **style
            )
            axes[1][column].plot(*zip(*line["loss"], strict=True), label=method, **{**style, "marker": None})
        axes[0][column].set_title(f"batch {batch}")
        axes[1][column].set_xlabel("updates")
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
    if not drawn:
        return _none(figure)
    axes[0][0].set_ylabel("mAP on report")
    axes[1][0].set_ylabel("loss")
    handles = max((axis.get_legend_handles_labels() for axis in axes[0]), key=lambda pair: len(pair[0]))
    figure.legend(*handles, loc="outside lower center", ncols=4)
    figure.suptitle(f"{base}, seed 0 at the chosen rate")
    return figure
