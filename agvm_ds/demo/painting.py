"""The pictures of the built-in data set: scikit-learn's handwritten digits on crops of its photographs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZE = 96
"""Height and width of an image, pixels."""
MAX_DIGITS = 6
HEIGHTS = (28, 54)
"""Shortest and tallest glyph frame, pixels; a digit fills most of its frame."""
MAX_OVERLAP = 0.1
"""Largest share of the smaller box that another box may cover; digits themselves never touch."""
VISIBLE = 0.5
"""Least opacity of a pixel that belongs to the digit."""
MIN_CONTRAST = 100.0
"""Least difference between a digit's luminance and that of its background, of 255."""
PHOTO_SPLIT = 448
"""The photographs' columns left of this are train's, the others val's."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Sources:
    """What pictures are made of."""

    glyphs: Array
    """(1797, 8, 8) float32, ink from 0 to 1."""
    labels: Array
    """(1797,) the digit that each glyph shows."""
    photos: tuple[Array, ...]
    """Each (427, 640, 3) uint8, RGB."""
    members: dict[str, Array]
    """split -> the indices of its glyphs."""


@dataclass(frozen=True)
class Scene:
    """One picture: (96, 96, 3) uint8 RGB, where its background is from, and its digits as COCO annotations."""

    pixels: Array
    segments: Array
    """(96, 96) uint8: which digit a pixel shows, counted from 1 in their order; 0: the photograph."""
    origin: dict[str, Any]
    digits: list[dict[str, Any]]


def load_sources(seed: int) -> Sources:
    """scikit-learn's glyphs and photographs; a fifth of the glyphs, by ``seed``, are val's."""
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError as error:
        raise ImportError(
            f"the built-in data set is made from scikit-learn's digits ({error}): pip install 'agvm_ds[demo]'"
        ) from error
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    fifth = len(order) // 5
    members = {"val": np.sort(order[:fifth]), "train": np.sort(order[fifth:])}
    photos = tuple(np.asarray(photo) for photo in load_sample_images().images)
    return Sources((digits.images / 16).astype(np.float32), digits.target, photos, members)


def paint(rng: np.random.Generator, sources: Sources, split: str) -> Scene:
    """Paste 1 to 6 digits of the split on a crop of its part of a photograph."""
    index = int(rng.integers(len(sources.photos)))
    photo = sources.photos[index]
    left, right = (0, PHOTO_SPLIT) if split == "train" else (PHOTO_SPLIT, photo.shape[1])
    x, y = int(rng.integers(left, right - SIZE + 1)), int(rng.integers(photo.shape[0] - SIZE + 1))
    canvas = photo[y : y + SIZE, x : x + SIZE].astype(np.float32)
    segments = np.zeros((SIZE, SIZE), dtype=np.uint8)
    digits: list[dict[str, Any]] = []
    for _ in range(int(rng.integers(1, MAX_DIGITS + 1))):
        glyph = int(rng.choice(sources.members[split]))
        alpha = _enlarge(sources.glyphs[glyph], rng)
        corner = _free_corner(alpha, segments > 0, [digit["bbox"] for digit in digits], rng)
        if corner is None:
            continue
        mask = _paste(canvas, alpha, corner, rng)
        digits.append(_annotation(mask, int(sources.labels[glyph])) | {"glyph": glyph})
        segments[mask] = len(digits)
    pixels = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return Scene(pixels, segments, {"photo": index, "corner": [x, y]}, digits)


def _enlarge(glyph: Array, rng: np.random.Generator) -> Array:
    """A glyph as an opacity map, (h, w) float32 from 0 to 1, cut to its visible pixels."""
    height = int(rng.integers(HEIGHTS[0], HEIGHTS[1] + 1))
    width = round(height * float(rng.uniform(0.8, 1.2)))
    ink = np.asarray(Image.fromarray(np.pad(glyph, 1)).resize((width, height), Image.Resampling.BICUBIC))
    alpha: Array = np.clip((ink - 0.4) / 0.2, 0, 1)
    rows, columns = (np.flatnonzero((alpha >= VISIBLE).any(axis=axis)) for axis in (1, 0))
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _free_corner(
    alpha: Array, taken: Array, boxes: list[list[int]], rng: np.random.Generator, tries: int = 40
) -> tuple[int, int] | None:
    """The (x, y) of a place where the digit touches no other and the boxes hardly overlap; None if none is met."""
    height, width = alpha.shape
    for _ in range(tries):
        x, y = int(rng.integers(SIZE - width + 1)), int(rng.integers(SIZE - height + 1))
        if any(_overlap((x, y, width, height), box) > MAX_OVERLAP for box in boxes):
            continue
        if not (taken[y : y + height, x : x + width] & (alpha > 0)).any():
            return x, y
    return None


def _overlap(a: Sequence[int], b: Sequence[int]) -> float:
    """Intersection of two (x, y, w, h) boxes as a share of the smaller one."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0) / min(a[2] * a[3], b[2] * b[3])


def _paste(canvas: Array, alpha: Array, corner: tuple[int, int], rng: np.random.Generator) -> Array:
    """Blend a digit of random colour into ``canvas``, in place; return its visible pixels, (96, 96) bool."""
    (x, y), (height, width) = corner, alpha.shape
    patch = canvas[y : y + height, x : x + width]
    patch += alpha[..., None] * (_colour(patch.mean(axis=(0, 1)), rng) - patch)
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[y : y + height, x : x + width] = alpha >= VISIBLE
    return mask


def _colour(background: Array, rng: np.random.Generator) -> Array:
    """An RGB colour that stands out from the mean background, (3,) float32 each."""
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)
    while True:
        colour = rng.uniform(0, 255, 3).astype(np.float32)
        if abs(float((colour - background) @ weights)) >= MIN_CONTRAST:
            return colour


def _annotation(mask: Array, label: int) -> dict[str, Any]:
    """COCO's fields for visible pixels ``mask``, (H, W) bool: box (x, y, w, h) in pixel edges, polygons, area."""
    polygons = [[c for point in loop for c in point] for loop in outlines(mask)]
    return {"category_id": label + 1, **extent(mask), "segmentation": polygons}


def extent(mask: Array) -> dict[str, Any]:
    """COCO's bbox and area of ``mask``, (H, W) bool, which is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return {"bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y], "area": int(mask.sum())}


def outlines(mask: Array) -> list[list[tuple[int, int]]]:
    """Polygons along pixel edges whose union is exactly ``mask``, (H, W) bool: lists of (x, y) corners.

    COCO's polygons have no holes, so a mask with one is cut in two through it.
    """
    loops = list(_loops(mask))
    hole = next((loop for loop in loops if _signed_area(loop) < 0), None)
    if hole is None:
        return loops
    cut = (min(x for x, _ in hole) + max(x for x, _ in hole)) // 2
    left, right = mask.copy(), mask.copy()
    left[:, cut:] = False
    right[:, :cut] = False
    return outlines(left) + outlines(right)


_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))
"""East, south, west, north as (dx, dy): the next one is a turn to the right."""


def _loops(mask: Array) -> Iterator[list[tuple[int, int]]]:
    """Walk all borders with the mask on the right hand: corners clockwise on screen, anticlockwise round a hole."""
    padded = np.pad(mask, 1)
    ahead: dict[tuple[int, int], set[int]] = {}
    for way, (dx, dy) in enumerate(_STEPS):
        neighbour = np.roll(padded, (dx, -dy), axis=(0, 1))
        for row, column in (np.argwhere(padded & ~neighbour) - 1).tolist():
            ahead.setdefault((column + (way in (1, 2)), row + (way in (2, 3))), set()).add(way)
    while ahead:
        yield _walk(ahead)


def _walk(ahead: dict[tuple[int, int], set[int]]) -> list[tuple[int, int]]:
    """Follow one border until it closes, taking its edges out of ``ahead``; return its corners."""
    point = next(iter(ahead))
    way = min(ahead[point])
    path: list[tuple[tuple[int, int], int]] = []
    while point in ahead:
        ways = ahead[point]
        right = (way + 1) % 4
        way = right if right in ways and path else min(ways)
        ways.remove(way)
        if not ways:
            del ahead[point]
        path.append((point, way))
        point = (point[0] + _STEPS[way][0], point[1] + _STEPS[way][1])
        if point == path[0][0]:
            break
    return [at for i, (at, way) in enumerate(path) if way != path[i - 1][1]]


def _signed_area(loop: list[tuple[int, int]]) -> float:
    """Positive for corners that go clockwise on screen (y down)."""
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(loop, [*loop[1:], loop[0]], strict=True)) / 2
