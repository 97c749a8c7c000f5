"""COCO's panoptic format: every pixel belongs to one segment, whose id is written as a colour.

A segment's id is R + 256 G + 65536 B, and 0 would be a pixel that belongs to none. Here 1 is the photograph, which is stuff,
and 2, 3, ... are the picture's digits, which are things, in the order of their instance annotations.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from agvm_ds.demo.painting import Array, Scene, extent


def id_image(scene: Scene) -> Array:
    """The ids as colours, (96, 96, 3) uint8 RGB; all are below 256."""
    ids = np.zeros_like(scene.pixels)
    ids[..., 0] = scene.segments + 1
    return ids


def segments_info(scene: Scene, stuff: int) -> list[dict[str, Any]]:
    """COCO's list of a picture's segments. stuff: the category of the photograph."""
    things = [{key: digit[key] for key in ("category_id", "bbox", "area")} for digit in scene.digits]
    found = [{"category_id": stuff, **extent(scene.segments == 0)}, *things]
    return [{"id": number, "iscrowd": 0, **segment} for number, segment in enumerate(found, 1)]
