"""Detections drawn on images, beside the true boxes: what a run shows at its end.

Nothing here needs a process group, and nothing here ends a finished training: where there is nothing to show, the log
says why and the function returns None.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Sequence
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

from agvm_ds.report.figures import save

logger = logging.getLogger("agvm_ds")

MATCH_IOU = 0.5
RIGHT, WRONG = "#0072B2", "#D55E00"
TRUTH = {
    "edgecolor": "white",
    "linewidth": 0.9,
    "path_effects": [withStroke(linewidth=2.2, foreground="black", alpha=0.6)],
}

Boxes = NDArray[Any]


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
    return save(figure, out)


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
