"""The figures of a run, for the terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group
from rich.table import Table

from agvm_ds.report.measures import Measures

RECENT = 10
"""Measured updates whose median the table shows: one alone is noisy."""


def summary_table(
    metrics: Mapping[str, float] | None, seconds: float, images_per_second: float, measures: Measures | None
) -> Group:
    """The figures of a run, to print with ``rich``.

    ``metrics``: mmdet's (``bbox_mAP``, ``segm_mAP_50``, ...), empty when nothing was detected, None when the run was
    not evaluated. ``seconds``: wall time of the whole run. ``measures``: None with AGVM off.
    """
    figures = {**_accuracy(metrics), "wall time": _duration(seconds), "images/s": f"{images_per_second:.1f}"}
    run = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in figures:
        run.add_column(name, justify="right")
    run.add_row(*figures.values())
    return Group(run, _module_table(measures)) if measures else Group(run)


def _accuracy(metrics: Mapping[str, float] | None) -> dict[str, str]:
    """Column -> text, for each kind of evaluation (bbox, segm) that was made."""
    if metrics is None:
        return {"mAP": "not evaluated"}
    kinds = [key.removesuffix("_mAP") for key in metrics if key.endswith("_mAP")] or ["bbox"]
    shown: dict[str, str] = {}
    for kind in kinds:
        prefix = f"{kind} " if len(kinds) > 1 else ""
        shown[f"{prefix}mAP"] = f"{metrics.get(f'{kind}_mAP', 0.0):.3f}"
        shown[f"{prefix}AP50"] = f"{metrics.get(f'{kind}_mAP_50', 0.0):.3f}"
    return shown


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _module_table(measures: Measures) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("module")
    for name in ("variance Φ", "scale factor μ", "noise scale, images"):
        table.add_column(name, justify="right")
    for name in measures.modules:
        table.add_row(
            f"{name} (anchor)" if name == measures.anchor else name,
            _text(_recent(measures.variance[name]), ".3f"),
            _text(measures.scale_factor[name][-1], ".3f"),
            _text(_recent(measures.noise_scale[name]), ",.0f"),
        )
    shown = min(RECENT, len(measures.updates))
    table.caption = f"Φ and noise scale: median of the last {shown} of {len(measures.updates)} measures"
    table.caption_justify = "left"
    return table


def _recent(values: Sequence[float]) -> float:
    defined = [value for value in values[-RECENT:] if not math.isnan(value)]
    return statistics.median_low(defined) if defined else math.nan


def _text(value: float, form: str) -> str:
    if math.isnan(value):
        return "-"
    return "∞" if math.isinf(value) else format(value, form)
