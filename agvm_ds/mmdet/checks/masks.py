"""Segmentations of a COCO file: polygons and run lengths that pycocotools would take for others, or end the process with."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

LIMIT = 1e6
"""A coordinate farther off costs pycocotools memory without bound: the system kills the process, and no message remains."""
SHORTEST = 6
"""Numbers of a triangle. pycocotools takes four for a box."""


class Problem(NamedTuple):
    """What is wrong with a segmentation."""

    what: str
    refused: bool = True


def mask_problem(segmentation: Any, width: int, height: int) -> Problem | None:
    """What is wrong with a segmentation of an image of this size: a list of polygons, or a dict of run lengths (RLE)."""
    if isinstance(segmentation, list):
        return _polygons_problem(segmentation)
    if isinstance(segmentation, Mapping):
        return _rle_problem(segmentation, width, height)
    return Problem("segmentation that is neither a list of polygons nor an RLE, and masks are read")


def _polygons_problem(polygons: list[Any]) -> Problem | None:
    if not polygons:
        return Problem("segmentation without a polygon")
    short = [index for index, polygon in enumerate(polygons) if isinstance(polygon, list) and len(polygon) < SHORTEST]
    for polygon in polygons:
        if not isinstance(polygon, list) or not set(map(type, polygon)) <= {int, float}:
            return Problem("polygon that is not a list of numbers [x1, y1, x2, y2, ...]")
        if not isfinite(sum(polygon)) or (polygon and not -LIMIT < min(polygon) <= max(polygon) < LIMIT):
            return Problem(f"polygon with NaN, infinity, or a coordinate beyond {LIMIT:.0e}")
        if len(polygon) % 2:
            return Problem("polygon with an odd count of numbers")
    if 0 in short:
        return Problem(f"polygon of less than {SHORTEST} numbers")
    if short:
        return Problem(f"polygon of less than {SHORTEST} numbers behind a good one, which adds nothing", refused=False)
    return None


def _rle_problem(rle: Mapping[str, Any], width: int, height: int) -> Problem | None:
    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width]:
        return Problem("RLE whose size is not the image's [height, width]")
    if isinstance(counts, list) and set(map(type, counts)) <= {int}:
        runs = counts
    elif isinstance(counts, str) and counts.isascii():
        runs = rle_runs(counts)
    else:
        return Problem("RLE whose counts are neither a list of integers nor a string")
    if min(runs, default=-1) < 0 or sum(runs) != width * height:
        return Problem("RLE whose counts do not add up to its image's pixels")
    return None


def rle_runs(counts: str) -> list[int]:
    """The run lengths of a compressed RLE; none when the string ends in the middle of one.

    COCO writes a number in groups of 5 bits, low ones first, a character chr(48 + 32 more + bits) each; the last group's
    highest bit is the sign. From the fourth run on it writes the difference to the run before the last.
    """
    codes = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((codes & 32) == 0)
    if not ends.size or ends[-1] != codes.size - 1 or codes.min() < 0 or codes.max() > 63:
        return []
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 12:  # 60 bits
        return []
    shifts = 5 * (np.arange(codes.size) - np.repeat(starts, lengths))
    runs = np.add.reduceat((codes & 31) << shifts, starts)
    runs -= np.where(codes[ends] & 16, np.int64(1) << (5 * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return [int(run) for run in runs]
