"""Run lengths against pycocotools', and what is accepted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pycocotools import mask

from agvm_ds.mmdet.checks.masks import mask_problem, rle_runs


@pytest.mark.parametrize("seed", range(40))
def test_run_lengths_are_those_of_pycocotools(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(1, 90, 2))
    pixels = (rng.random((height, width)) < rng.random()).astype(np.uint8)
    if seed % 4 == 0:
        pixels[:] = seed % 8 == 0  # long runs, and a first run of 0
    encoded = mask.encode(np.asfortranarray(pixels))
    flat = pixels.flatten(order="F")
    changes = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]
    expected = np.diff(changes).tolist()
    runs = rle_runs(encoded["counts"].decode())
    assert runs == ([0, *expected] if flat[0] else expected)
    whole = {"size": [height, width], "counts": encoded["counts"].decode()}
    assert mask_problem(whole, width, height) is None
    assert mask_problem({**whole, "counts": runs}, width, height) is None


@pytest.mark.parametrize("counts", ["", "a", "\x00", "~~~", "o" * 40])
def test_strings_that_are_no_run_lengths_have_none(counts: str) -> None:
    assert rle_runs(counts) == []


@pytest.mark.parametrize(
    "segmentation", [[[1, 1, 9, 1, 9, 9]], [[1, 1, 9.5, 1, 9, 9], [-5, 1, 70, 1, 9, 9, 3, 3]], [[0, 0, 0, 0, 0, 0]]]
)
def test_polygons_that_reach_out_or_have_no_area_are_accepted(segmentation: Any) -> None:
    assert mask_problem(segmentation, 64, 48) is None


def test_a_short_polygon_behind_a_good_one_is_only_noted() -> None:
    problem = mask_problem([[1, 1, 9, 1, 9, 9], [1, 1]], 64, 48)
    assert problem is not None and not problem.refused
