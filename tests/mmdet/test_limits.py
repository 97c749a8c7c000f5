"""What a detector's own code would do and a run here would not."""

from __future__ import annotations

from typing import Any

import pytest
from mmdet.models import BaseDetector
from torch import nn

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.configs import detector_of, read_config
from agvm_ds.mmdet.limits import refuse_detector, refuse_unsupported
from agvm_ds.mmdet.plan import Plan, make_plan
from benchmarks.zoo import bare_detector


def plan(kind: str | None = None) -> Plan:
    """Of a run in this precision."""
    return make_plan({} if kind is None else {kind: {"enabled": True}}, read_config(None), 2)


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


@pytest.mark.parametrize("kind", ["bf16", "torch_autocast"])
def test_a_teacher_that_is_no_submodule_is_refused_in_half_precision(kind: str) -> None:
    class Taught(BaseDetector):
        def aug_test(self) -> None: ...
        def extract_feat(self) -> None: ...
        def simple_test(self) -> None: ...

    taught = Taught()
    object.__setattr__(taught, "teacher_model", nn.Linear(1, 1))
    refuse_detector(taught, plan())
    with pytest.raises(ConfigError, match="Taught in half precision: its teacher"):
        refuse_detector(taught, plan(kind))
    registered = Taught()
    registered.teacher_model = nn.Linear(1, 1)
    refuse_detector(registered, plan(kind))


def test_proposals_that_are_weights_are_refused_where_weights_are_half() -> None:
    detector = bare_detector(read_config("sparse_rcnn/sparse_rcnn_r50_fpn_1x_coco"))
    refuse_detector(detector, plan())
    refuse_detector(detector, plan("torch_autocast"))
    with pytest.raises(ConfigError, match=r"SparseRCNN in bf16: its proposals are weights.*torch_autocast"):
        refuse_detector(detector, plan("bf16"))
