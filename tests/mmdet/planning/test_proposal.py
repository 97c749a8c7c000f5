"""``launch/plan.py``: the ready JSONs are what it prints, what it prints is accepted, and what cannot be is refused."""

from __future__ import annotations

import json
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from mmcv import Config
from mmcv.runner.hooks import HOOKS

from agvm_ds.config import ConfigError
from agvm_ds.deepspeed_json import load_config
from agvm_ds.mmdet.configs import read_config
from agvm_ds.mmdet.plan import make_plan
from agvm_ds.mmdet.planning.proposal import Proposal, propose
from agvm_ds.mmdet.planning.request import Request
from tests.mmdet import coco

ROOT = Path(__file__).parents[3]
FASTER, MASK, RETINA = "faster_rcnn_r50_fpn_1x_coco", "mask_rcnn_r50_fpn_1x_coco", "retinanet_r50_fpn_1x_coco"
DEMO = str(ROOT / "agvm_ds/demo/faster_rcnn_digits.py")
READY = {"agvm_512_4x8": (4, 8, 16), "agvm_512_8x8": (8, 8, 8), "agvm_512_16x8": (16, 8, 4)}
"""File -> nodes, GPUs a node, micro-batch."""


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
    runpy.run_path(str(ROOT / "launch/plan.py"))["main"]()


def proposed(config: str = FASTER, **more: Any) -> Proposal:
    return propose(Request(**{"config": config, "nodes": 4, "gpus": 8, "batch": 512, "memory": 80.0} | more))


def rule_of(proposal: Proposal, figure: str) -> str:
    return next(row.rule for row in proposal.rows if row.figure == figure)


@pytest.mark.parametrize("name", READY)
def test_a_ready_file_is_what_the_command_writes_and_prints(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes, gpus, micro = READY[name]
    where = ["--nodes", str(nodes), "--gpus", str(gpus), "--memory", "80", "--batch", "512"]
    run_command(monkeypatch, FASTER, *where, "--write", str(tmp_path / "X.json"))
    text = (ROOT / f"ds_configs/{name}.json").read_text()
    assert (tmp_path / "X.json").read_text() == text
    assert text in capsys.readouterr().out
    assert json.loads(text)["train_micro_batch_size_per_gpu"] == micro


@pytest.mark.parametrize("name", READY)
def test_a_ready_file_is_accepted_on_its_ranks_and_accumulates_on_fewer(name: str) -> None:
    nodes, gpus, micro = READY[name]
    ready = load_config(ROOT / f"ds_configs/{name}.json")
    batch = make_plan(ready, read_config(FASTER), nodes * gpus).batch
    assert (batch.train, batch.micro, batch.accumulation) == (512, micro, 1)
    batch = make_plan(ready, read_config(FASTER), nodes * gpus // 2).batch
    assert (batch.train, batch.micro, batch.accumulation) == (512, micro, 2)
    with pytest.raises(ConfigError, match="does not divide"):
        make_plan(ready, read_config(FASTER), nodes * gpus * 2)


OFFICIAL = {  # detector, batch -> lr, warmup_iters, start, clip: Sense-X/AGVM's configs
    (FASTER, 256): (0.16 * 2**0.5, 920, 1020, [820, 1020]),
    (FASTER, 512): (0.38, 460, 560, [360, 560]),
    (MASK, 256): (0.16 * 2**0.5, 920, 1020, [820, 1020]),
    (MASK, 512): (0.32, 460, 560, [360, 560]),
}


@pytest.mark.parametrize(("config", "batch"), OFFICIAL)
def test_the_official_recipes_come_out(config: str, batch: int) -> None:
    rate, warmup, start, clip = OFFICIAL[config, batch]
    found = proposed(config, batch=batch)
    assert found.deepspeed["optimizer"] == {
        "type": "SGD",
        "params": {"lr": rate, "momentum": 0.9, "weight_decay": 1e-4},
    }
    block = found.deepspeed["agvm"]
    assert (block["start_step"], block["clip_window"], block["interval"], block["ema_decay"]) == (start, clip, 10, 0.97)
    assert found.deepspeed["gradient_clipping"] == 1.0
    assert found.changes == {
        "lr_config.warmup": "exp",
        "lr_config.warmup_iters": warmup,
        "lr_config.warmup_ratio": 0.001,
        "runner.max_epochs": 16,
        "lr_config.policy": "step",
        "lr_config.step": [12, 14],
    }
    assert rule_of(found, "learning rate").startswith("official AGVM recipe of")


def test_the_printed_command_is_read_back_by_train() -> None:
    found = proposed(cfg_options={"model.backbone.norm_eval": False})
    words = shlex.split(found.command("ds_configs/agvm_512_4x8.json"))
    assert words[:4] == ["deepspeed", "--hostfile", "hosts", "launch/train.py"]
    args = runpy.run_path(str(ROOT / "launch/train.py"))["parser"]().parse_args(words[4:])
    assert args.cfg_options == {"model.backbone.norm_eval": False, **found.changes}
    cfg = read_config(args.config, args.cfg_options)
    assert (cfg.runner.max_epochs, cfg.lr_config.warmup_iters, cfg.model.backbone.norm_eval) == (16, 460, False)
    assert proposed(nodes=1).command("X").startswith("deepspeed --num_gpus 8 launch/train.py")


def warm_up_of(cfg: Config) -> Any:
    """The hook that mmcv makes of lr_config."""
    settings = {key: value for key, value in cfg.lr_config.items() if key != "policy"}
    return HOOKS.get(f"{cfg.lr_config.policy[0].upper()}{cfg.lr_config.policy[1:]}LrUpdaterHook")(**settings)


@pytest.mark.parametrize("config", [FASTER, RETINA, "yolox_s_8x8_300e_coco", "deformable_detr_r50_16x2_50e_coco"])
def test_mmcv_warms_up_in_updates(config: str) -> None:
    found = proposed(config, micro=2, images=117_266)
    hook = warm_up_of(read_config(config, found.changes))
    assert (hook.warmup, hook.warmup_iters, hook.warmup_by_epoch) == ("exp", 460, False)
    hook.base_lr = hook.regular_lr = [0.04]
    begin, middle, end = (hook.get_warmup_lr(update)[0] for update in (0, 229, 459))
    assert begin < 5e-5 < middle < 0.02 and end == pytest.approx(0.04, rel=0.02), "it ends where the schedule goes on"


def test_a_config_that_clips_does_so_in_every_update() -> None:
    found = proposed("deformable_detr_r50_16x2_50e_coco", micro=2)
    assert found.deepspeed["gradient_clipping"] == 0.1 and "clip_window" not in found.deepspeed["agvm"]
    assert rule_of(found, "clipping to norm 0.1") == "the config's optimizer_config.grad_clip"
    assert not any(row.figure == "clipping to norm 1" for row in found.rows)


def test_an_unpublished_detector_keeps_its_epochs_and_has_the_rule_of_its_optimizer() -> None:
    found = proposed(RETINA)
    assert found.deepspeed["optimizer"]["params"]["lr"] == pytest.approx(0.01 * 8 * 2)  # 16 -> 128 linearly, -> 512
    assert not any(key in found.changes for key in ("runner.max_epochs", "lr_config.step"))
    adam = proposed("deformable_detr_r50_16x2_50e_coco", micro=2)
    assert adam.deepspeed["optimizer"]["params"]["lr"] == pytest.approx(2e-4 * 4)  # 32 -> 512
    assert rule_of(adam, "training images").startswith("COCO train2017's, filter_empty_gt is off")
    assert adam.deepspeed["optimizer"]["type"] == "AdamW"
    assert "paramwise_cfg" not in adam.deepspeed["optimizer"]["params"]


@pytest.mark.parametrize(
    "more",
    [{"images": 117_000}, {"cfg_options": {"model.backbone.depth": 101}}, {"batch": 1024}, {"scaling": "linear-sqrt"}],
)
def test_a_published_rate_is_for_its_own_data_backbone_and_batch_and_gives_way_to_scaling(more: dict[str, Any]) -> None:
    rate = proposed(**more).deepspeed["optimizer"]["params"]["lr"]
    assert rate == pytest.approx(0.32 * (2**0.5 if more.get("batch") else 1))


def test_scaling_as_asked_and_the_alternatives_shown() -> None:
    found = proposed(scaling="linear")
    assert found.deepspeed["optimizer"]["params"]["lr"] == pytest.approx(0.64)
    shown = {row.figure: row.value for row in found.rows if row.figure.startswith("- ")}
    assert shown == {"- by sqrt": "0.113137", "- by linear-sqrt": "0.32", "- published": "0.38"}


def test_images_are_counted_as_mmdet_trains_on_them(tmp_path: Path) -> None:
    """Of three images, one has no annotation."""
    place = coco.write(tmp_path, lambda data: data["annotations"].__delitem__(slice(0, 2)))
    changes = {"data.train.ann_file": str(place / "train.json"), "data.train.classes": list(coco.CLASSES)}
    with pytest.raises(ConfigError, match="the training set has 2 images, fewer than one global batch"):
        proposed(cfg_options=changes)


def test_a_run_by_iterations_sees_as_many_images() -> None:
    options = {
        "runner": {"_delete_": True, "type": "IterBasedRunner", "max_iters": 90000},
        "lr_config.step": [60000, 80000],
        "lr_config.by_epoch": False,
        "evaluation.interval": 5000,
    }
    found = proposed(RETINA, cfg_options=options)
    assert found.changes["runner.max_iters"] == 2812  # 90000 x 16 / 512
    assert found.changes["lr_config.step"] == [1875, 2500]
    assert found.changes["evaluation.interval"] == 156


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown data": (
        {"config": DEMO, "cfg_options": {"data_root": "nowhere"}},
        "--images is needed .* nowhere/annotations/train.json",
    ),
    "unknown base": (
        {"config": DEMO, "images": 2048, "batch": 32},
        "--base-batch is needed: the config has no auto_scale_lr.base_batch_size",
    ),
    "fewer images than a batch": ({"images": 500}, "the training set has 500 images, fewer than one global batch"),
    "ends before AGVM starts": (
        {"images": 5120, "batch": 512},
        "AGVM would start at update 120, and the run's last is",
    ),
    "optimizer": ({"cfg_options": {"optimizer.type": "Rprop"}}, "'Rprop': not supported with AGVM"),
    "runner": ({"cfg_options": {"resume_from": "x.pth"}}, "resume_from = 'x.pth'"),
    "config": ({"config": "faster_rcnn_r50_fpn_9x_coco"}, "config not found: .* faster_rcnn_r50_fpn_"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name: str) -> None:
    change, said = REFUSED[name]
    with pytest.raises(ConfigError, match=said):
        proposed(**change)


SPACE = ["--nodes", "4", "--gpus", "8", "--memory", "80", "--batch", "512"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", "0"], "argument --nodes: 0: must be an integer of at least 1"),
        (["--nodes", "four"], "argument --nodes: four: must be an integer of at least 1"),
        (["--memory", "-1"], "--memory -1.0: must be more than 0 GiB"),
        (["--memory", "nan"], "--memory nan: must be more than 0 GiB"),
        (["--zero-stage", "4"], "argument --zero-stage: invalid choice: 4"),
        (["--scaling", "cubic"], "argument --scaling: invalid choice: 'cubic'"),
        (["--write", "no/such/folder/X.json"], "--write no/such/folder/X.json: No such file or directory"),
    ],
)
def test_mistakes_of_the_command_line(arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=said):
        run_command(monkeypatch, FASTER, *SPACE, *arguments)
