"""Metrics as plain numbers: what was not detected counts as 0, in each of several data sets."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agvm_ds.mmdet.evaluate import Packed, collect, metrics_of
from tests.launch import run_ranks

LOGGER = logging.getLogger("tests")


class Plain:
    """A data set whose evaluation is given."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.found = found

    def evaluate(self, results: Any, logger: Any, **options: Any) -> dict[str, Any]:
        return self.found


class Two(Plain):
    """mmdet's ConcatDataset, as far as it matters."""

    separate_eval, datasets = True, [None, None]


def panoptic() -> list[dict[str, Any]]:
    """In a rank: results of 3 images are gathered, which the sampler deals out to two ranks."""
    mine = [torch.distributed.get_rank() + 2 * turn for turn in range(2)]
    found = [{"pan_results": np.full((40, 30), image, np.int32), "image": image} for image in mine]
    return collect(found, 3) or []


def test_panoptic_maps_travel_packed_and_come_back_whole(tmp_path: Path) -> None:
    """5,000 maps of COCO's images are 6 GB, which NCCL would put on one GPU."""
    big = np.repeat(np.arange(100, dtype=np.int32), 4800).reshape(480, 1000)
    packed = Packed.of(big)
    assert len(packed.bytes) < big.nbytes / 50
    assert (packed.unpacked() == big).all() and packed.unpacked().flags.writeable
    found, other = run_ranks(panoptic, 2, tmp_path)
    assert [one["image"] for one in found] == [0, 1, 2] and other == []
    assert all(one["pan_results"].dtype == np.int32 and (one["pan_results"] == one["image"]).all() for one in found)


def test_one_set() -> None:
    found = {"bbox_mAP": 0.25, "bbox_mAP_copypaste": "0.250"}
    told = metrics_of(Plain(found), [], {"metric": ["bbox", "segm"]}, LOGGER)
    assert told.numbers == {"bbox_mAP": 0.25, "segm_mAP": 0.0, "segm_mAP_50": 0.0}
    assert told.undetected and not metrics_of(Plain(found), [], {"metric": "bbox"}, LOGGER).undetected


def test_what_is_no_number_is_logged_alone(caplog: pytest.LogCaptureFixture) -> None:
    found = {
        "bbox_mAP": np.float32(0.5),
        "one": torch.tensor(0.25),
        "per class": [0.1, 0.2],
        "all": np.ones(2),
        "no": None,
    }
    with caplog.at_level("INFO"):
        told = metrics_of(Plain(found), [], {"metric": "bbox"}, LOGGER)
    assert told.numbers == {"bbox_mAP": 0.5, "one": 0.25}
    assert [message.split(":")[0] for message in caplog.messages] == ["per class", "all", "no"]


def test_each_of_several_sets_and_none_that_is_not_there() -> None:
    found = {"1_bbox_mAP": 0.25}
    expected = {"1_bbox_mAP": 0.25, "0_bbox_mAP": 0.0, "0_bbox_mAP_50": 0.0}
    assert metrics_of(Two(found), [], {"metric": "bbox"}, LOGGER).numbers == expected
