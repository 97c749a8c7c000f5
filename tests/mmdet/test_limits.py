"""What a detector's own code would do and a run here would not."""

from __future__ import annotations

from typing import Any

import pytest
from mmdet.models import BaseDetector
from torch import nn

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.configs import detector_of, read_config
from agvm_ds.mmdet.limits import refuse_own_steps, refuse_unsupported
from agvm_ds.mmdet.plan import make_plan


@pytest.mark.parametrize("step", ["train_step", "val_step"])
def test_a_step_of_its_own_is_refused(step: str) -> None:
    detector = detector_of(read_config(None))
    refuse_own_steps(detector, half=True)
    own: Any = type("Own", (type(detector),), {step: lambda *_: {}})
    detector.__class__ = own
    with pytest.raises(ConfigError, match=f"Own has a {step} of its own"):
        refuse_own_steps(detector, half=False)


def test_a_network_that_mmdets_tools_would_rebuild_is_refused_whatever_is_done_with_it() -> None:
    cfg = read_config("rfnext/rfnext_search_mask_rcnn_pvtv2-b0_fpn_1x_coco")
    with pytest.raises(ConfigError, match="RFSearchHook trains and tests another network"):
        detector_of(cfg)
    with pytest.raises(ConfigError, match="RFSearchHook trains and tests another network"):
        refuse_unsupported(cfg, make_plan({}, cfg, 2))


def test_a_teacher_that_is_no_submodule_is_refused_in_half_precision() -> None:
    class Taught(BaseDetector):
        def aug_test(self) -> None: ...
        def extract_feat(self) -> None: ...
        def simple_test(self) -> None: ...

    taught = Taught()
    object.__setattr__(taught, "teacher_model", nn.Linear(1, 1))
    refuse_own_steps(taught, half=False)
    with pytest.raises(ConfigError, match="Taught in half precision: its teacher"):
        refuse_own_steps(taught, half=True)
    registered = Taught()
    registered.teacher_model = nn.Linear(1, 1)
    refuse_own_steps(registered, half=True)
