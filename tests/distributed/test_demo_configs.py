"""The demo's configs with masks and with panoptic segments: trained on two ranks, and measured again by launch/test.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agvm_ds.mmdet.configs import DEMO_CONFIG
from tests.trainer import cfg_options, launch, logged, write_json

SETTINGS = {
    "train_batch_size": 8,
    "zero_optimization": {"stage": 2},
    "agvm": {"precondition": "none", "interval": 8},
}
OPTIONS = {"lr_config.warmup_iters": 8, "evaluation.interval": 100, "log_config.interval": 10}


def trained(name: str, epochs: int, digits: Path, place: Path) -> list[str]:
    """The config, the DeepSpeed checkpoint and the options that go with them, for launch/test.py."""
    config = place / "digits_config.py"  # under another name: the demo itself would look for its own data
    config.write_text(f'_base_ = "{DEMO_CONFIG.with_name(name)}"\n')
    own = {
        "data.train.ann_file": digits / f"annotations/{prefix(name)}val.json",
        "data.train.img_prefix": digits / "val",
    }
    if prefix(name):
        own["data.train.seg_prefix"] = digits / "panoptic_val"
    options = cfg_options({"data_root": f"{digits}/", "runner.max_epochs": epochs, **OPTIONS, **own})
    words = [str(config), "--deepspeed_config", str(write_json(place, SETTINGS)), "--work-dir", str(place / "work")]
    outcome = launch("train.py", [*words, "--seed", "0", *options], place, timeout=240)
    assert outcome.good, outcome.output
    return [str(place / "work/config.py"), str(place / "work/deepspeed")]


def prefix(name: str) -> str:
    return "panoptic_" if name.startswith("panoptic") else ""


@pytest.mark.parametrize(
    ("name", "epochs", "measured"),
    [
        pytest.param("mask_rcnn_digits.py", 48, {"bbox_mAP": 0.2, "segm_mAP_50": 0.2}, marks=pytest.mark.extended),
        ("panoptic_fpn_digits.py", 24, {"PQ": 5, "PQ_st": 80}),
    ],
)
def test_it_learns_and_is_measured_alike_afterwards(
    name: str, epochs: int, measured: dict[str, float], digits: Path, tmp_path: Path
) -> None:
    """Updates are of eight images, one an epoch: enough for boxes and masks, and to tell photographs from digits."""
    words = trained(name, epochs, digits, tmp_path)
    more = ["--json", str(tmp_path / "m.json"), "--show-dir", str(tmp_path / "shown")]
    outcome = launch("test.py", [*words, *more], tmp_path)
    assert outcome.good, outcome.output
    found: dict[str, Any] = json.loads((tmp_path / "m.json").read_text())["metric"]
    last = logged(tmp_path / "work")[-1]
    for metric, least in measured.items():
        assert found[metric] > least, found
        assert found[metric] == pytest.approx(last[metric], abs=1e-3)
    assert len(list((tmp_path / "shown").glob("*.png"))) == 8
