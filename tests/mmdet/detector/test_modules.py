"""How detectors are cut: the rule, and every detector that mmdet ships."""

from __future__ import annotations

import re

import pytest
from torch import nn

from agvm_ds.mmdet.configs import read_config, shipped_configs
from agvm_ds.mmdet.detector.modules import modules_of
from benchmarks.zoo import DOCUMENT, Cut, bare_detector, cut_of, cuts, shares_of


def parts(**children: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def layer() -> nn.Module:
    return nn.Linear(2, 2)


def test_a_roi_head_is_cut_when_it_has_a_mask_head() -> None:
    boxes = parts(bbox_roi_extractor=parts(), bbox_head=layer())
    assert modules_of(parts(backbone=layer(), roi_head=boxes)) == ["backbone", "roi_head"]
    masks = parts(bbox_head=nn.ModuleList([layer(), layer()]), mask_head=layer(), mask_iou_head=layer())
    assert modules_of(parts(backbone=layer(), neck=parts(), roi_head=masks)) == [
        "backbone",
        "roi_head.bbox_head",
        "roi_head.mask_head",
        "roi_head.mask_iou_head",
    ]


def test_a_mask_head_beside_the_others_is_a_module() -> None:
    names = ["backbone", "bbox_head", "segm_head", "mask_head"]
    assert modules_of(parts(**{name: layer() for name in names})) == names


@pytest.fixture(scope="module")
def found() -> dict[str, Cut]:
    """Of every config that mmdet ships."""
    return {cut.config: cut for cut in cuts(list(shipped_configs()))}


NOT_BUILT = {
    "convnext": "mmcls",
    "timm_example": "mmcls",
    "rfnext": "mmcls|custom_hooks",
    "objects365": "unexpected keyword argument 'bbox_head'",
    "retinanet": "init_cfg and pretrained cannot be specified at the same time",
}
"""Family -> why mmdet itself cannot build some of its configs."""


def test_every_trainable_parameter_is_in_a_module_that_is_there(found: dict[str, Cut]) -> None:
    built = [cut for cut in found.values() if not cut.reason]
    assert len(built) >= 615
    assert [cut.config for cut in built if cut.outside] == []
    assert [cut.config for cut in built if not cut.shares.get("backbone")] == []  # the anchor
    assert all(sum(cut.shares.values()) == pytest.approx(1) for cut in built)


def test_what_cannot_be_built_is_mmdets_own(found: dict[str, Cut]) -> None:
    for cut in found.values():
        assert not cut.reason or re.search(NOT_BUILT[cut.family], cut.reason), cut
    assert sum(bool(cut.reason) for cut in found.values()) <= 13


@pytest.mark.parametrize(
    ("config", "modules"),
    [
        ("faster_rcnn/faster_rcnn_r50_fpn_1x_coco", ["backbone", "neck", "rpn_head", "roi_head"]),
        (
            "mask_rcnn/mask_rcnn_r50_fpn_1x_coco",
            ["backbone", "neck", "rpn_head", "roi_head.bbox_head", "roi_head.mask_head"],
        ),
        (
            "mask_rcnn/mask_rcnn_r50_caffe_c4_1x_coco",
            ["backbone", "rpn_head", "roi_head.shared_head", "roi_head.bbox_head", "roi_head.mask_head"],
        ),
        (
            "scnet/scnet_r50_fpn_1x_coco",
            ["backbone", "neck", "rpn_head"]
            + [
                f"roi_head.{part}"
                for part in ("bbox_head", "mask_head", "semantic_head", "feat_relay_head", "glbctx_head")
            ],
        ),
        (
            "panoptic_fpn/panoptic_fpn_r50_fpn_1x_coco",
            ["backbone", "neck", "rpn_head", "roi_head.bbox_head", "roi_head.mask_head", "semantic_head"],
        ),
        ("yolact/yolact_r50_1x8_coco", ["backbone", "neck", "bbox_head", "segm_head", "mask_head"]),
        ("mask2former/mask2former_r50_lsj_8x2_50e_coco", ["backbone", "panoptic_head"]),
    ],
)
def test_modules_of_well_known_detectors(found: dict[str, Cut], config: str, modules: list[str]) -> None:
    assert list(found[config].shares) == modules


def test_a_lost_parameter_would_be_found() -> None:
    cfg = read_config(None)
    detector = bare_detector(cfg)
    assert shares_of(detector, ["backbone", "neck", "rpn_head"])["rest"] == pytest.approx(
        cut_of("demo", cfg).shares["roi_head"]
    )


SPLITS = {
    "DETR": ["detr/detr_r50_8x2_150e_coco"],
    "Deformable DETR": ["deformable_detr/deformable_detr_r50_16x2_50e_coco"],
    "MaskFormer, Mask2Former": [
        "maskformer/maskformer_r50_mstrain_16x1_75e_coco",
        "mask2former/mask2former_r50_lsj_8x2_50e_coco",
    ],
}


@pytest.mark.parametrize("detector", SPLITS)
def test_the_documents_splits_of_transformers_fit(detector: str) -> None:
    line = next(line for line in DOCUMENT.read_text().splitlines() if line.startswith(f"| {detector} |"))
    names = re.findall(r'"([a-z_.]+)"', line)
    for config in SPLITS[detector]:
        shares = shares_of(bare_detector(read_config(config)), names)
        assert set(shares) == set(names)
        assert all(share > 0 for share in shares.values())
