"""Segment ids as colours: id = R + 256 G + 65536 B."""

from __future__ import annotations

from typing import Any

import numpy as np

_PLACES = np.array([1, 256, 65536])


def rgb2id(colors: Any) -> Any:
    """(..., 3) uint8 -> (...) int64."""
    return np.asarray(colors).astype(np.int64) @ _PLACES


def id2rgb(ids: Any) -> Any:
    """(...) -> (..., 3) uint8."""
    return (np.asarray(ids)[..., None] // _PLACES % 256).astype(np.uint8)
