"""mmdet's detectors, whole, trained for two updates under launch/train.py: every module is measured."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from mmcv import Config

from benchmarks.shrunk import make_data
from benchmarks.zoo import Cut, lines_of
from benchmarks.zoo_training import FAMILIES, collected, pipeline, train, without_weights

IN_CI = (("SOLOv2", False), ("DETR", True))
"""(name, in bf16). Neither has a bbox head beside its backbone and neck; the rest is one more of the same."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("zoo"))


@pytest.mark.parametrize(
    ("name", "half"),
    [
        pytest.param(*row, marks=[] if row in IN_CI else [pytest.mark.extended])
        for row in product(FAMILIES, (False, True))
    ],
)
def test_a_detector_trains_and_every_module_is_measured(name: str, half: bool, data: Path, tmp_path: Path) -> None:
    training = train(name, FAMILIES[name], tmp_path, data, half)
    assert training.run.reason == ""
    assert training.run.losses[0] != training.run.losses[1]
    assert all(0 <= phi <= 2 for phi in training.run.variances.values())


def test_no_weights_are_read_and_other_init_stays() -> None:
    model = {
        "pretrained": "x.pth",
        "backbone": {"init_cfg": {"type": "Pretrained", "checkpoint": "x.pth"}, "depth": 50},
        "heads": [{"init_cfg": {"type": "Normal", "std": 0.01}}],
    }
    assert without_weights(model) == {
        "backbone": {"depth": 50},
        "heads": [{"init_cfg": {"type": "Normal", "std": 0.01}}],
    }


def test_the_pipeline_gives_what_the_detectors_own_gives() -> None:
    steps = [{"type": "LoadAnnotations"}, {"type": "Collect", "keys": ["img", "gt_bboxes", "gt_semantic_seg"]}]
    cfg = Config({"data": {"train": {"type": "MultiImageMixDataset", "dataset": {"pipeline": steps}}}})
    keys = collected(cfg)
    assert keys == ["img", "gt_bboxes", "gt_semantic_seg"]
    made = {step["type"]: step for step in pipeline(keys, {}, 96)}
    assert made["LoadAnnotations"]["with_seg"] and not made["LoadAnnotations"]["with_mask"]
    assert made["SegRescale"]["scale_factor"] == 1 / 4
    assert "SegRescale" not in {step["type"] for step in pipeline(keys[:2], {}, 96)}


def test_the_table_has_a_line_for_each_cut_and_each_reason() -> None:
    shares = {"backbone": 0.75, "head": 0.25}
    cuts = [Cut("a/1", shares), Cut("a/2", shares), Cut("a/3", {"backbone": 0.9, "rest": 0.1}), Cut("b/1", {}, "why")]
    assert lines_of(cuts)[2:] == [
        "| a | 2 | backbone 75 %, head 25 % | 0 % |",
        "| a | 1 | backbone 90 % | 10 % |",
        "| b | 1 | not built: why |  |",
    ]
