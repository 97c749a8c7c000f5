"""What a detector's own code would do and a run here would not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from mmdet.models import BaseDetector
from torch import nn

from agvm_ds.config import ConfigError
from agvm_ds.mmdet import limits
from agvm_ds.mmdet.configs import detector_of, read_config
from agvm_ds.mmdet.limits import refuse_detector, refuse_unsupported
from agvm_ds.mmdet.plan import Plan, make_plan
from benchmarks.zoo import bare_detector


def plan(kind: str | None = None) -> Plan:
    """Of a run in this precision."""
    block = {"enabled": True} | ({"dtype": "bfloat16"} if kind == "torch_autocast" else {})
    return make_plan({} if kind is None else {kind: block}, read_config(None), 2)


@pytest.mark.parametrize("step", ["train_step", "val_step"])
def test_a_step_of_its_own_is_refused(step: str) -> None:
    detector = detector_of(read_config(None))
    refuse_detector(detector, plan("bf16"))
    own: Any = type("Own", (type(detector),), {step: lambda *_: {}})
    detector.__class__ = own
    with pytest.raises(ConfigError, match=f"Own has a {step} of its own"):
        refuse_detector(detector, plan())


def test_a_network_that_mmdets_tools_would_rebuild_is_refused_whatever_is_done_with_it() -> None:
    cfg = read_config("rfnext/rfnext_search_mask_rcnn_pvtv2-b0_fpn_1x_coco")
    with pytest.raises(ConfigError, match="RFSearchHook trains and tests another network"):
        detector_of(cfg)
    with pytest.raises(ConfigError, match="RFSearchHook trains and tests another network"):
        refuse_unsupported(cfg, make_plan({}, cfg, 2))


def test_a_teacher_that_is_no_submodule_is_refused_where_weights_are_half() -> None:
    class Taught(BaseDetector):
        def aug_test(self) -> None: ...
        def extract_feat(self) -> None: ...
        def simple_test(self) -> None: ...

    taught = Taught()
    object.__setattr__(taught, "teacher_model", nn.Linear(1, 1))
    refuse_detector(taught, plan())
    with pytest.raises(ConfigError, match="Taught in half precision: its teacher"):
        refuse_detector(taught, plan("bf16"))
    registered = Taught()
    registered.teacher_model = nn.Linear(1, 1)
    refuse_detector(registered, plan("bf16"))
    refuse_detector(taught, plan("torch_autocast"))


def test_proposals_that_are_weights_are_refused_where_weights_are_half() -> None:
    detector = bare_detector(read_config("sparse_rcnn/sparse_rcnn_r50_fpn_1x_coco"))
    refuse_detector(detector, plan())
    refuse_detector(detector, plan("torch_autocast"))
    with pytest.raises(ConfigError, match=r"SparseRCNN in bf16: its proposals are weights.*torch_autocast"):
        refuse_detector(detector, plan("bf16"))


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("deformable_detr/deformable_detr_r50_16x2_50e_coco", "MultiScaleDeformableAttention"),
        ("mask2former/mask2former_r50_lsj_8x2_50e_coco", "MultiScaleDeformableAttention"),
        ("dcn/faster_rcnn_r50_fpn_dconv_c3-c5_1x_coco", "DeformConv2dPack"),
        ("vfnet/vfnet_r50_fpn_1x_coco", "DeformConv2d"),
    ],
)
def test_what_has_no_bf16_kernel_on_a_gpu_is_refused_there(config: str, name: str, monkeypatch: Any) -> None:
    detector = bare_detector(read_config(config))
    refuse_detector(detector, plan("bf16"))  # on a CPU
    monkeypatch.setattr(limits, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cuda"))
    refuse_detector(detector, plan())
    for kind in ("bf16", "torch_autocast"):
        with pytest.raises(ConfigError, match=rf"\({name}\) in bf16: mmcv's kernel"):
            refuse_detector(detector, plan(kind))
