"""Metrics as plain numbers: what was not detected counts as 0, in each of several data sets."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

from agvm_ds.mmdet.evaluate import metrics_of

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
