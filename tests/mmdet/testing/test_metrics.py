"""What a data set cannot measure, or a detector's results do not have, is refused before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
from mmdet.datasets import coco_panoptic

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.configs import DEMO_CONFIG, read_config
from agvm_ds.mmdet.data_sets import missing_packages
from agvm_ds.mmdet.evaluate import plain_detector
from agvm_ds.mmdet.testing.metrics import evaluation_options, refuse_beyond, results_of, unknown_metrics


@pytest.mark.parametrize(
    ("node", "metrics", "said"),
    [
        ({"type": "CocoDataset"}, ["bbox", "mAP"], ["'mAP': not known; allowed: bbox, segm, proposal"]),
        ({"type": "LVISV1Dataset"}, ["PQ"], ["'PQ': not known; allowed: bbox, segm, proposal"]),
        ({"type": "VOCDataset"}, ["bbox"], ["'bbox': not known; allowed: mAP, recall"]),
        ({"type": "WIDERFaceDataset"}, ["mAP"], []),
        ({"type": "CityscapesDataset"}, ["cityscapes"], []),
        ({"type": "CocoPanopticDataset"}, ["PQ", "bbox"], ["'bbox': needs ins_ann_file"]),
        ({"type": "CocoPanopticDataset", "ins_ann_file": "x.json"}, ["PQ", "segm"], []),
        ({"type": "Unheard"}, ["anything"], []),
    ],
)
def test_a_metric_is_one_of_the_data_set(node: dict[str, Any], metrics: list[str], said: list[str]) -> None:
    found = list(unknown_metrics(node, metrics))
    assert len(found) == len(said)
    assert all(text in line for text, line in zip(said, found, strict=True))


@pytest.mark.parametrize(
    ("name", "has", "lacks"),
    [
        ("faster_rcnn_digits.py", ("bbox", "proposal"), "segm"),
        ("mask_rcnn_digits.py", ("bbox", "segm", "proposal"), "PQ"),
        ("panoptic_fpn_digits.py", ("PQ", "bbox", "segm", "proposal"), None),
    ],
)
def test_a_metric_is_one_of_the_detectors_results(name: str, has: tuple[str, ...], lacks: str | None) -> None:
    detector = plain_detector(read_config(str(DEMO_CONFIG.with_name(name))), "cpu")
    assert results_of(detector) == has
    refuse_beyond(detector, [*has, "mAP"])
    if lacks:
        with pytest.raises(ConfigError, match=rf"'{lacks}': the results of \w+ do not have it; allowed: bbox"):
            refuse_beyond(detector, [lacks])


def test_shipped_detectors_without_a_mask_head_of_that_name_are_not_refused() -> None:
    for name, has in [("rpn_r50_fpn_1x_coco", ("proposal",)), ("yolact_r50_1x8_coco", ("bbox", "segm", "proposal"))]:
        assert results_of(plain_detector(read_config(name), "cpu")) == has
    solo = plain_detector(read_config("decoupled_solo_light_r50_fpn_3x_coco"), "cpu")
    assert "segm" in results_of(solo)


def test_what_the_hook_takes_is_not_given_to_the_data_set() -> None:
    cfg = read_config(None, {"evaluation.save_best": "bbox_mAP", "evaluation.classwise": True})
    assert evaluation_options(cfg, ["bbox"]) == {"metric": ["bbox"], "classwise": True}


def test_without_panopticapi_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"type": "CocoPanopticDataset"}
    assert list(missing_packages(node, "data.test")) == []
    monkeypatch.setattr(coco_panoptic, "panopticapi", None)
    (said,) = missing_packages(node, "data.test")
    assert said.startswith("data.test: ") and "pip install git+https://github.com/cocodataset/panopticapi.git" in said
    assert list(missing_packages({"type": "CocoDataset"}, "data.test")) == []
