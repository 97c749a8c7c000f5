"""Averages at another batch remember as many images."""

from __future__ import annotations

import pytest
from mmcv import Config

from agvm_ds.mmdet.configs import read_config
from agvm_ds.mmdet.plan import Batch
from agvm_ds.mmdet.planning.averages import scaled_averages
from agvm_ds.mmdet.planning.proposal import propose
from agvm_ds.mmdet.planning.request import Request

BATCH = Batch(512, 16, 1, 32)


def test_yoloxs_average() -> None:
    """Its last 15 epochs, without mosaics, are 3,470 updates at 512: of an average of 10,000 they would be a third."""
    found = propose(Request("yolox_s_8x8_300e_coco", nodes=4, gpus=8, batch=512, micro=2, images=117_266))
    scaled = {key: value for key, value in found.changes.items() if key.startswith("custom_hooks")}
    assert scaled == {"custom_hooks.2.momentum": 0.0007997, "custom_hooks.2.total_iter": 250}  # 64 -> 512
    hook = read_config("yolox_s_8x8_300e_coco", found.changes).custom_hooks[2]
    assert (hook.type, hook.momentum, hook.total_iter) == ("ExpMomentumEMAHook", 0.0007997, 250)


@pytest.mark.parametrize("kind", ["EMAHook", "LinearMomentumEMAHook"])
@pytest.mark.parametrize("interval", [1, 2])
def test_a_hook_that_is_alone_and_one_that_takes_a_power_of_its_momentum(kind: str, interval: int) -> None:
    hook = {"type": kind, "momentum": 0.1, "warm_up": 50, "interval": interval}
    changes = scaled_averages(Config({"custom_hooks": hook}), 16, BATCH).changes
    assert changes.keys() == {"custom_hooks.momentum", "custom_hooks.warm_up"} and changes["custom_hooks.warm_up"] == 2
    assert changes["custom_hooks.momentum"] ** interval == pytest.approx(1 - (1 - 0.1**interval) ** 32, rel=1e-3)


def test_a_config_without_averages() -> None:
    assert scaled_averages(read_config("faster_rcnn_r50_fpn_1x_coco"), 16, BATCH).changes == {}
