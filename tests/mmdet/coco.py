"""A small COCO data set to spoil: three images of 64 x 48, a cat and a dog in each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog")
WIDTH, HEIGHT = 64, 48


def content() -> dict[str, Any]:
    """Its annotation file, with polygons."""
    images = [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (1, 2, 3)]
    notes = [
        {"id": 10 * image + kind, "image_id": image, "category_id": kind, "iscrowd": 0, **thing(4 * kind)}
        for image in (1, 2, 3)
        for kind in (1, 2)
    ]
    return {"images": images, "annotations": notes, "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]}


def thing(corner: int) -> dict[str, Any]:
    """A box of 20 x 16 and its outline."""
    x, y = corner, corner + 20
    outline = [corner, corner, y, corner, y, corner + 16, corner, corner + 16]
    return {"bbox": [x, x, 20, 16], "area": 320, "segmentation": [outline]}


def rle(counts: Any, size: Any = (HEIGHT, WIDTH)) -> dict[str, Any]:
    return {"counts": counts, "size": list(size)}


def write(place: Path, change: Callable[[dict[str, Any]], Any] = lambda data: None) -> Path:
    """The images and ``train.json`` (changed) and ``val.json`` (not changed) in a folder."""
    (place / "images").mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for number in (1, 2, 3):
        Image.fromarray(pixels).save(place / f"images/{number}.png")
    changed = content()
    change(changed)
    (place / "train.json").write_text(json.dumps(changed))
    (place / "val.json").write_text(json.dumps(content()))
    return place


def first(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the first annotation (id 11); a value of ``...`` takes the key out."""
    return lambda data: _change(data["annotations"][0], changes)


def first_image(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """The same of the first image (id 1)."""
    return lambda data: _change(data["images"][0], changes)


def _change(entry: dict[str, Any], changes: dict[str, Any]) -> None:
    entry.update(changes)
    for key in [key for key, value in changes.items() if value is ...]:
        del entry[key]


def config_lines(place: Path) -> str:
    """Lines of Python after the demo's config: it reads this data set, with masks."""
    return f"""
classes = {CLASSES!r}
train_pipeline[1] = dict(type="LoadAnnotations", with_bbox=True, with_mask=True)
for split, file in (("train", "train"), ("val", "val"), ("test", "val")):
    data[split].update(ann_file="{place}/" + file + ".json", img_prefix="{place}/images", classes=classes)
"""
