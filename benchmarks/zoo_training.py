"""Two measured updates of detectors that differ in kind, by launch/train.py on two ranks, ZeRO stage 2.

The detectors are mmdet's own, whole: shrunk are the images (the built-in digits as COCO's first classes), the batch and the
run, and no pretrained weights are read. Kept are the model, its losses and its optimizer with its settings by parameter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcv import Config

from agvm_ds.mmdet.configs import read_config
from benchmarks.shrunk import MICRO, RANKS, WORK_DIR, Run, trained

FAMILIES = {
    "Faster R-CNN": "faster_rcnn/faster_rcnn_r50_fpn_1x_coco",
    "Mask R-CNN": "mask_rcnn/mask_rcnn_r50_fpn_1x_coco",
    "Cascade Mask R-CNN": "cascade_rcnn/cascade_mask_rcnn_r50_fpn_1x_coco",
    "HTC": "htc/htc_r50_fpn_1x_coco",
    "Panoptic FPN": "panoptic_fpn/panoptic_fpn_r50_fpn_1x_coco",
    "PointRend": "point_rend/point_rend_r50_caffe_fpn_mstrain_1x_coco",
    "RetinaNet": "retinanet/retinanet_r50_fpn_1x_coco",
    "FCOS": "fcos/fcos_r50_caffe_fpn_gn-head_1x_coco",
    "ATSS": "atss/atss_r50_fpn_1x_coco",
    "YOLOX": "yolox/yolox_s_8x8_300e_coco",
    "SOLOv2": "solov2/solov2_light_r18_fpn_3x_coco",
    "YOLACT": "yolact/yolact_r50_1x8_coco",
    "DETR": "detr/detr_r50_8x2_150e_coco",
    "Deformable DETR": "deformable_detr/deformable_detr_r50_16x2_50e_coco",
    "Mask2Former": "mask2former/mask2former_r50_lsj_8x2_50e_coco",
    "Sparse R-CNN": "sparse_rcnn/sparse_rcnn_r50_fpn_1x_coco",
    "SSD": "ssd/ssd300_coco",
    "Mask R-CNN, Swin": "swin/mask_rcnn_swin-t-p4-w7_fpn_1x_coco",
    "RetinaNet, PVT": "pvt/retinanet_pvt-t_fpn_1x_coco",
}
"""What it is called -> mmdet's config."""
SIDE = 128
"""Of an image, pixels."""
NORM = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "to_rgb": True}
SETTINGS = {
    "train_batch_size": RANKS * MICRO,
    "zero_optimization": {"stage": 2},
    "agvm": {"interval": 1},
}
"""The DeepSpeed JSON; the optimizer is the config's."""


BF16 = {"bf16": {"enabled": True}}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
OF_FP32_WEIGHTS = ("Sparse R-CNN",)
"""These cannot have weights in bf16: their layers compute in it."""


@dataclass(frozen=True)
class Training:
    """How a detector's two updates went."""

    name: str
    config: str
    run: Run


def train(name: str, config: str, place: Path, data: Path, half: bool = False) -> Training:
    """Launch one. data: made by shrunk.make_data; half: in bf16."""
    place.mkdir(parents=True, exist_ok=True)
    more = (AUTOCAST if name in OF_FP32_WEIGHTS else BF16) if half else {}
    file, settings, work_dir = place / "shrunk.py", place / "ds.json", place / WORK_DIR
    shrunk(config, data).dump(str(file))
    settings.write_text(json.dumps(SETTINGS | more))
    words = [str(file), "--deepspeed_config", str(settings), "--work-dir", str(work_dir), "--seed", "0"]
    return Training(name, config, trained([*words, "--no-validate", "--revert-sync-bn"], place, agvm=True))


def shrunk(name: str, data: Path) -> Config:
    """A shipped config with the digits for its data: see above."""
    cfg = read_config(name)
    cfg.model = without_weights(cfg.model)
    if "input_size" in cfg.model:  # YOLOX scales its batches itself
        cfg.model.input_size = (SIDE, SIDE)
    digits = {
        "type": "CocoDataset",
        "ann_file": str(data / "train.json"),
        "img_prefix": str(data / "digits/train"),
        "seg_prefix": str(data / "semantic"),
        "pipeline": pipeline(collected(cfg), cfg.model, side_of(cfg)),
    }
    cfg.data = {"samples_per_gpu": MICRO, "workers_per_gpu": 0, "train": digits, "val": digits, "test": digits}
    cfg.runner = {"type": "EpochBasedRunner", "max_epochs": 1}
    cfg.lr_config = {"policy": "fixed"}
    cfg.log_config.interval = 1
    cfg.custom_hooks, cfg.checkpoint_config, cfg.workflow = [], None, [("train", 1)]
    cfg.pop("fp16", None)
    return cfg


def without_weights(node: Any) -> Any:
    """A model's settings that read no file."""
    if isinstance(node, Mapping):
        read = node.get("init_cfg")
        gone = {"pretrained"} | ({"init_cfg"} if isinstance(read, Mapping) and "checkpoint" in read else set())
        return {key: without_weights(value) for key, value in node.items() if key not in gone}
    return type(node)(map(without_weights, node)) if isinstance(node, (list, tuple)) else node


def collected(cfg: Config) -> list[str]:
    """What the config's own pipeline gives the detector."""
    split = cfg.data.train
    while "pipeline" not in split:
        split = split.dataset
    return list(next(step["keys"] for step in reversed(split.pipeline) if step["type"] == "Collect"))


def side_of(cfg: Config) -> int:
    """SIDE, unless the detector's anchors are made for one size (SSD)."""
    head = cfg.model.get("bbox_head") or {}
    return int((head.get("anchor_generator") or {}).get("input_size", SIDE))


def pipeline(keys: Sequence[str], model: Mapping[str, Any], side: int) -> list[dict[str, Any]]:
    """The digits' images, at one size, with the annotations that a detector of these keys wants."""
    semantic = "gt_semantic_seg" in keys
    fused = "semantic_head" in model.get("roi_head", {})  # HTC's is compared at an eighth of the image's size
    return [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations", "with_bbox": True, "with_mask": "gt_masks" in keys, "with_seg": semantic},
        {"type": "Resize", "img_scale": (side, side), "keep_ratio": True},
        {"type": "RandomFlip", "flip_ratio": 0.0},
        {"type": "Normalize", **NORM},
        {"type": "Pad", "size_divisor": 32},
        *([{"type": "SegRescale", "scale_factor": 1 / 8 if fused else 1 / 4}] if semantic else []),
        {"type": "DefaultFormatBundle"},
        {"type": "Collect", "keys": list(keys)},
    ]
