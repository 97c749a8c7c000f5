"""The pictures of a report: several runs in one, or beside each other. Each has a caption that says how to read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from agvm_ds.report.figures import (
    DASHES,
    PALETTE,
    SMOOTH,
    draw_module,
    dress,
    empty_figure,
    module_legend,
    style,
)
from agvm_ds.report.measures import Measures
from agvm_ds.report.runs import Run

COLORS = ("black", *PALETTE)
POOL = 21
"""Measures whose noise and signal make one point of the noise scale."""


@dataclass(frozen=True)
class Picture:
    """``name``: of its PNG, without the ending."""

    name: str
    title: str
    caption: str
    figure: Figure


def pictures(runs: Sequence[Run]) -> Iterator[Picture]:
    """All for which the runs have something."""
    yield Picture(
        "loss", "Loss", "Mean over the log's interval, of all micro-batches and ranks.", _curves(runs, "loss")
    )
    if metric := next((run.metric for run in runs if run.metric), None):
        yield Picture("score", metric, "As evaluated while training.", _curves(runs, metric, "val"))
    yield Picture("throughput", "Images/s", "Of all ranks, data loading included.", _curves(runs, "images/s"))
    measured = [run for run in runs if run.measures is not None]
    if not measured:
        return
    for quantity, title, label, caption in (
        (
            "variance",
            "Gradient variance by module",
            "gradient variance Φ",
            f"1 - cosine of the gradients of two halves of the batch: 0 they agree, 1 they have nothing in common. Dots "
            f"are single measures, lines a running median of {SMOOTH}.",
        ),
        (
            "scale_factor",
            "Scale factor by module",
            "scale factor μ",
            "What multiplies the module's learning rate; the anchor's is 1. A run that watches only shows what it would be.",
        ),
        ("effective_lr", "Learning rate by module", "learning rate", "With which each module stepped."),
    ):
        yield Picture(quantity, title, caption, _by_module(measured, quantity, label))
    yield Picture(
        "noise_scale",
        "Gradient noise scale by module",
        f"In images: the batch beyond which more images a step gain little. Mean noise over mean signal of {POOL} measures; "
        "a gap is where the signal was not above 0. The grey line is the run's batch.",
        _noise_scales(measured),
    )


def _curves(runs: Sequence[Run], key: str, mode: str = "train") -> Figure:
    """By updates and, for runs of other batches, by images."""
    width, longest = 10, max(len(run.name) for run in runs)
    figure = empty_figure(width, 3.6)
    by_updates, by_images = figure.subplots(1, 2, sharey=True)
    for place, run in enumerate(runs):
        updates, values = run.curve(key, mode)
        look = {"color": COLORS[place % len(COLORS)], "linestyle": DASHES[place % len(DASHES)], "label": run.name}
        marker = "o" if mode == "val" or len(updates) == 1 else None
        by_updates.plot(updates, values, marker=marker, markersize=4, **look)
        by_images.plot([update * run.batch for update in updates], values, marker=marker, markersize=4, **look)
    dress(by_updates, key)
    dress(by_images, "")
    by_updates.set_xlabel("updates")
    by_images.set_xlabel("images")
    entry = 0.9 + 0.08 * longest  # inches, about
    columns = min(max(int(width / entry), 1), 4)
    figure.legend(
        *by_updates.get_legend_handles_labels(),
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        handlelength=3.5,
    )
    return figure


def _by_module(runs: Sequence[Run], quantity: str, label: str) -> Figure:
    """A panel a run, side by side, on one scale."""

    def draw(axes: Any, run: Run, measures: Measures, name: str, look: dict[str, Any]) -> None:
        draw_module(axes, measures.updates, getattr(measures, quantity)[name], look, faint=quantity == "variance")

    return _panels(runs, label, draw)


def _noise_scales(runs: Sequence[Run]) -> Figure:
    def draw(axes: Any, run: Run, measures: Measures, name: str, look: dict[str, Any]) -> None:
        axes.axhline(run.batch, color="0.6", linewidth=1)
        axes.set_yscale("log")
        draw_module(axes, measures.updates, pooled(measures, name), look, faint=False)

    return _panels(runs, "noise scale, images", draw)


def pooled(measures: Measures, name: str) -> list[float]:
    """Noise scale of a module from POOL measures around each; nan where undefined."""
    noise, signal = (np.array(column[name]) for column in (measures.noise, measures.signal))
    half = POOL // 2
    values = []
    for middle in range(len(noise)):
        part = slice(max(middle - half, 0), middle + half + 1)
        over, under = np.nanmean(noise[part]) if _some(noise[part]) else math.nan, _mean(signal[part])
        values.append(float(over / under) if under > 0 else math.nan)
    return values


def _some(values: Any) -> bool:
    return bool(np.isfinite(values).any())


def _mean(values: Any) -> float:
    return float(np.nanmean(values)) if _some(values) else math.nan


def _panels(runs: Sequence[Run], label: str, draw: Callable[[Any, Run, Measures, str, dict[str, Any]], None]) -> Figure:
    """A panel a run; a module has the same line in all of them, and black is the first run's anchor."""
    figure = empty_figure(max(5.2 * len(runs), 8), 4.2)
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    seen = [run.measures for run in runs if run.measures is not None]
    names = list(dict.fromkeys(name for measures in seen for name in measures.modules))
    for axes, run in zip(panels, runs, strict=True):
        if (measures := run.measures) is not None:
            for name in measures.modules:
                draw(axes, run, measures, name, style(names.index(name)))
        dress(axes, label if axes is panels[0] else "")
        axes.set_title(run.name, loc="left", fontsize=10)
        axes.set_xlabel("updates")
    anchors = {measures.anchor for measures in seen}
    module_legend(figure, names, seen[0].anchor if len(anchors) == 1 else "")
    return figure
