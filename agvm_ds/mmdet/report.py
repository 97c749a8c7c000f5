"""What a run shows at its end: a table of figures, the modules over time, and detections drawn on images.

Nothing here needs a process group, and nothing here ends a finished training: where there is nothing to show, the log
says why and the function returns None.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from PIL import Image
from rich import box
from rich.console import Group
from rich.table import Table

logger = logging.getLogger("agvm_ds")

RECENT = 10
"""Measured updates whose median the table shows: one alone is noisy."""
SMOOTH = 11
"""Measured updates whose running median the plot draws."""
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours, told apart with any colour vision; black is the anchor's."""
DASHES = ("solid", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
MATCH_IOU = 0.5
RIGHT, WRONG = "#0072B2", "#D55E00"
TRUTH = {
    "edgecolor": "white",
    "linewidth": 0.9,
    "path_effects": [withStroke(linewidth=2.2, foreground="black", alpha=0.6)],
}

Boxes = NDArray[Any]


@dataclass(frozen=True)
class Measures:
    """The lines of one ``agvm.jsonl``, m of them, as columns: name of the module -> m numbers, nan where undefined."""

    anchor: str
    updates: list[int]
    variance: dict[str, list[float]]
    scale_factor: dict[str, list[float]]
    noise_scale: dict[str, list[float]]

    @property
    def modules(self) -> list[str]:
        """The anchor, then the others in the file's order."""
        return sorted(self.scale_factor, key=lambda name: name != self.anchor)


def read_measures(agvm_jsonl: Path) -> Measures | None:
    """Read ``agvm.jsonl``; None, with a warning, if it is missing or holds no measure. Broken lines are passed over."""
    try:
        lines = agvm_jsonl.read_text().splitlines()
    except OSError as error:
        logger.warning("no AGVM measures to show: %s: %s", agvm_jsonl, error.strerror)
        return None
    records = [record for record in map(_record, lines) if record]
    if len(records) < len(lines):
        logger.warning("%s: %d of %d lines are not measures", agvm_jsonl, len(lines) - len(records), len(lines))
    if not records:
        logger.warning("no AGVM measures to show: %s holds none (no update was measured)", agvm_jsonl)
        return None
    names = list(records[-1]["modules"])
    columns = {
        key: {name: [_number(r["modules"].get(name, {}).get(key)) for r in records] for name in names}
        for key in ("variance", "scale_factor", "noise_scale")
    }
    return Measures(str(records[-1]["anchor"]), [int(record["update"]) for record in records], **columns)


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        return record if {"update", "anchor", "modules"} <= set(record) else None
    except (ValueError, TypeError):
        return None


def _number(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


# ---- the table


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


# ---- the modules over time


def plot_modules(agvm_jsonl: Path, out: Path, title: str = "AGVM: modules of the detector") -> Path | None:
    """Draw variance and scale factor of each module over updates into the PNG ``out``; None if nothing was measured."""
    measures = read_measures(agvm_jsonl)
    if measures is None:
        return None
    figure = Figure(figsize=(9, 6.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    for axes, columns in ((above, measures.variance), (below, measures.scale_factor)):
        for place, name in enumerate(measures.modules):
            _draw_module(axes, measures.updates, columns[name], _style(place), faint=axes is above)
    _dress(above, "gradient variance Φ\n(0 agree, 1 unrelated, no unit)")
    _dress(below, "scale factor μ\n(multiplies the learning rate)")
    below.set_xlabel("update")
    above.set_title(f"dots: single measures · lines: running median of {SMOOTH}", loc="left", fontsize=9, color="0.35")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    handles = [Line2D([], [], **_style(place)) for place in range(len(measures.modules))]
    labels = [f"{name} (anchor)" if name == measures.anchor else name for name in measures.modules]
    figure.legend(handles, labels, loc="outside lower left", ncols=5, frameon=False, handlelength=3.5, fontsize=9)
    return _save(figure, out)


def _style(place: int) -> dict[str, Any]:
    """Line style of the module at ``place``; 0 is the anchor's."""
    if place == 0:
        return {"color": "black", "linewidth": 2.6, "linestyle": "solid", "zorder": 2}
    other = place - 1
    return {"color": PALETTE[other % len(PALETTE)], "linewidth": 1.8, "linestyle": DASHES[1:][other % 4], "zorder": 3}


def _draw_module(axes: Axes, updates: list[int], values: list[float], style: dict[str, Any], faint: bool) -> None:
    """One module's line; with ``faint`` each value is a faint dot and the line is their running median."""
    if faint:
        axes.plot(updates, values, ".", color=style["color"], alpha=0.25, markersize=4, markeredgewidth=0, zorder=1)
        values = _running_median(values)
    marker = "o" if len(updates) == 1 else None
    axes.plot(updates, values, marker=marker, **style)


def _running_median(values: list[float]) -> list[float]:
    half = SMOOTH // 2
    windows = ([v for v in values[max(0, i - half) : i + half + 1] if not math.isnan(v)] for i in range(len(values)))
    return [statistics.median(window) if window else math.nan for window in windows]


def _dress(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)


def _save(figure: Figure, out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")
    return out


# ---- detections


@dataclass(frozen=True)
class Sample:
    """Some images with what is known about them, in the same order: what ``draw_detections`` draws."""

    images: list[Path]
    results: list[Any]
    """mmdet's result for each image: a list of (k, 5) arrays by class, or a tuple of it and the masks."""
    truths: list[tuple[Boxes, Boxes]]
    """Boxes (k, 4) as x1, y1, x2, y2 and labels (k,) of each image."""


def sample_of(dataset: Any, results: Sequence[Any], count: int = 16) -> Sample:
    """``count`` images spread evenly over an mmdet data set and its ``results``, which are in the data set's order."""
    chosen = sorted({int(place) for place in np.linspace(0, len(results) - 1, min(count, len(results)))})
    sample = Sample([], [], [])
    for place in chosen:
        part, index = _part_of(dataset, place)
        annotation = part.get_ann_info(index)
        sample.images.append(Path(part.img_prefix or "") / part.data_infos[index]["filename"])
        sample.results.append(results[place])
        sample.truths.append((annotation["bboxes"], annotation["labels"]))
    return sample


def _part_of(dataset: Any, place: int) -> tuple[Any, int]:
    """The data set that image ``place`` is from, and its place there: mmdet's ConcatDataset has several."""
    while hasattr(dataset, "cumulative_sizes"):
        which = bisect_right(dataset.cumulative_sizes, place)
        place -= dataset.cumulative_sizes[which - 1] if which else 0
        dataset = dataset.datasets[which]
    return dataset, place


def draw_detections(
    sample: Sample, classes: Sequence[str], out: Path, score_threshold: float = 0.5, columns: int = 4
) -> Path | None:
    """Draw detections, and thin the true boxes, into the PNG sheet ``out``; None, with a warning, if it cannot.

    A detection is drawn as right when it has the label of a true box and an IoU of 0.5 or more with it.
    """
    if not sample.images:
        logger.warning("no detections to show: no image was evaluated")
        return None
    if not all(isinstance(_boxes(result), list) for result in sample.results):
        logger.warning("no detections to show: the results are not boxes by class")
        return None
    rows = math.ceil(len(sample.images) / columns)
    figure = Figure(figsize=(3 * columns, 3 * rows + 0.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    cells = figure.subplots(rows, columns, squeeze=False).ravel()
    for cell in cells:
        cell.set_axis_off()
    try:
        for cell, image, result, truth in zip(cells, sample.images, sample.results, sample.truths, strict=False):
            _draw_image(cell, image, _detections(result, score_threshold), truth, classes)
    except OSError as error:
        logger.warning("no detections to show: an image cannot be read: %s", error)
        return None
    keys: dict[str, dict[str, Any]] = {
        f"detection, score at least {score_threshold}": {"color": RIGHT, "linewidth": 2.5},
        "the same, wrong label or place": {"color": WRONG, "linewidth": 2.5, "linestyle": "--"},
        "true box": {"color": "white", "linewidth": 0.9, "path_effects": TRUTH["path_effects"]},
    }
    handles = [Line2D([], [], label=label, **style) for label, style in keys.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=12)
    return _save(figure, out)


def _boxes(result: Any) -> Any:
    """mmdet's result without its masks."""
    return result[0] if isinstance(result, tuple) else result


def _detections(result: Any, score_threshold: float) -> list[tuple[Boxes, float, int]]:
    """(box, score, label) of the detections to draw, the surest last, so that they lie on top."""
    found = [(row[:4], float(row[4]), label) for label, rows in enumerate(_boxes(result)) for row in np.asarray(rows)]
    return sorted((item for item in found if item[1] >= score_threshold), key=lambda item: item[1])


def _draw_image(
    cell: Axes,
    image: Path,
    detections: list[tuple[Boxes, float, int]],
    truth: tuple[Boxes, Boxes],
    classes: Sequence[str],
) -> None:
    with Image.open(image) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    cell.imshow(pixels, interpolation="bicubic", extent=(0, pixels.shape[1], pixels.shape[0], 0))
    for corners in truth[0]:
        _draw_box(cell, corners, **TRUTH)
    for corners, score, label in detections:
        right = any(label == true and _iou(corners, other) >= MATCH_IOU for other, true in zip(*truth, strict=True))
        color = RIGHT if right else WRONG
        _draw_box(cell, corners, color=color, linewidth=1.8, linestyle="solid" if right else "--")
        _label(cell, corners, f"{classes[label]} {score:.2f}", color)


def _label(cell: Axes, corners: Boxes, text: str, color: str) -> None:
    """Write on the box's upper edge, or under it where the image ends above."""
    height = cell.get_ylim()[0]
    inside = float(corners[1]) < 0.07 * height
    frame = {"facecolor": color, "edgecolor": "none", "pad": 0.8, "alpha": 0.9}
    at = (max(float(corners[0]), 0), max(float(corners[1]), 0))
    cell.text(*at, text, color="white", fontsize=7.5, va="top" if inside else "bottom", clip_on=True, bbox=frame)


def _draw_box(cell: Axes, corners: Boxes, **style: Any) -> None:
    x1, y1, x2, y2 = (float(value) for value in corners)
    cell.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **style))


def _iou(a: Boxes, b: Boxes) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = float(max(width, 0) * max(height, 0))
    return shared / (float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - shared)
