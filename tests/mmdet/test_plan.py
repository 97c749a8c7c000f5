"""Who decides what: the DeepSpeed JSON where it speaks, else the mmdet config; the log says what was set aside."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from mmcv import Config, ConfigDict
from mmdet.apis.train import auto_scale_lr

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.configs import read_config
from agvm_ds.mmdet.limits import refuse_unsupported
from agvm_ds.mmdet.plan import Plan, make_plan

JSON_OPTIMIZER = {"type": "SGD", "params": {"lr": 0.1}}


def planned(settings: dict[str, Any], change: dict[str, Any] | None = None, **more: Any) -> tuple[Plan, Config]:
    cfg = read_config(None, change)
    return make_plan({"train_batch_size": 16, **settings}, cfg, ranks=2, **more), cfg


def test_the_config_decides_where_the_json_is_silent() -> None:
    plan, cfg = planned({})
    assert plan.deepspeed["gradient_clipping"] == 10.0
    assert cfg.lr_config is not None
    assert plan.notes[1:] == ["optimizer AdamW from the mmdet config"]


def test_the_json_goes_first_and_the_log_says_what_was_set_aside() -> None:
    scheduler = {"type": "WarmupLR", "params": {}}
    plan, cfg = planned({"optimizer": JSON_OPTIMIZER, "scheduler": scheduler, "gradient_clipping": 2.0})
    assert plan.deepspeed["gradient_clipping"] == 2.0
    assert cfg.lr_config is None
    assert plan.notes[1:] == [
        "optimizer SGD from the DeepSpeed JSON; the config's AdamW is set aside",
        "clipping from the DeepSpeed JSON; the config's grad_clip is set aside",
        "learning-rate schedule from the DeepSpeed JSON; the config's lr_config is set aside",
    ]


def test_what_a_config_says_of_precision_and_steps_is_set_aside() -> None:
    plan, _ = planned({}, {"fp16": {"loss_scale": 512.0}, "optimizer_config.type": "GradientCumulativeOptimizerHook"})
    assert any("GradientCumulativeOptimizerHook set aside" in note for note in plan.notes)
    assert any("fp16 is set aside" in note for note in plan.notes)


def test_an_optimizer_that_is_made_here_is_no_question_under_zero_offload() -> None:
    """DeepSpeed refuses a client optimizer there, by a key that a user may set."""
    zero = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    key = "zero_force_ds_cpu_optimizer"
    assert planned(zero, {})[0].deepspeed[key] is False
    assert planned({**zero, key: True}, {})[0].deepspeed[key] is True
    assert key not in planned({}, {})[0].deepspeed


@pytest.mark.parametrize(
    ("settings", "half", "computes"),
    [
        ({}, None, None),
        ({"bf16": {"enabled": True}}, "bf16", "bf16"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, None, "bf16"),
        ({"torch_autocast": {"enabled": True, "dtype": "half"}}, None, "fp16"),
        ({"torch_autocast": {"enabled": False, "dtype": "half"}}, None, None),
    ],
)
def test_what_parameters_are_and_what_layers_compute_in(settings: dict[str, Any], half: Any, computes: Any) -> None:
    plan, _ = planned(settings, {})
    assert (plan.half, plan.computes) == (half, computes)


def test_what_is_not_done_here_is_set_aside() -> None:
    plan, cfg = planned({}, {"auto_resume": True})
    refuse_unsupported(cfg, plan)
    assert any("the config's auto_resume is set aside" in note for note in plan.notes)


def test_fp32_weights_that_deepspeed_cannot_find_are_not_published() -> None:
    """With round_robin_gradients, ``safe_get_full_fp32_param`` of DeepSpeed 0.19.8 returns others' elements (off by 0.69)."""
    zero = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    planned(zero, {})
    with pytest.raises(ConfigError, match="round_robin_gradients with bf16"):
        planned(zero | {"bf16": {"enabled": True}}, {})


def test_clipping_by_another_norm_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"norm_type = 1: DeepSpeed clips by the 2-norm"):
        planned({}, {"optimizer_config.grad_clip": {"max_norm": 1.0, "norm_type": 1}})


@pytest.mark.parametrize("there", [{"optimizer": None}, {}])
def test_an_optimizer_must_be_named_by_one_of_them(there: dict[str, Any]) -> None:
    cfg = read_config(None)
    cfg._cfg_dict.pop("optimizer")
    cfg.merge_from_dict(there)
    plan = make_plan({"train_batch_size": 16, "optimizer": JSON_OPTIMIZER}, cfg, 2)
    assert "optimizer SGD from the DeepSpeed JSON" in plan.notes
    with pytest.raises(ConfigError, match="neither the DeepSpeed JSON nor the mmdet config names an optimizer"):
        make_plan({"train_batch_size": 16}, cfg, 2)


def test_the_effective_config_has_the_micro_batch_of_the_json() -> None:
    plan, cfg = planned({"train_micro_batch_size_per_gpu": 2})
    assert (plan.batch.accumulation, cfg.data.train_dataloader.samples_per_gpu) == (4, 2)


@pytest.mark.parametrize("key", ["bf16", "bfloat16"])
def test_both_of_deepspeeds_keys_mean_bf16(key: str) -> None:
    assert planned({key: {"enabled": True}})[0].half == "bf16"
    assert planned({key: {"enabled": False}})[0].half is None


@pytest.mark.parametrize(("asked", "enabled"), [(True, False), (False, True)])
def test_the_rate_is_scaled_to_the_global_batch_once(asked: bool, enabled: bool) -> None:
    change = {"auto_scale_lr": ConfigDict(enable=enabled, base_batch_size=64), "optimizer.lr": 0.02}
    plan, cfg = planned({}, change, scale_rate=asked)
    assert cfg.optimizer.lr == pytest.approx(0.02 * 16 / 64)
    assert not cfg.auto_scale_lr.enable
    assert "auto_scale_lr: lr = 0.02 x batch 16 / 64 = 0.005" in plan.notes


@pytest.mark.parametrize("base", [8, 16, 64])
@pytest.mark.parametrize("enabled", [True, False])
def test_the_rate_is_mmdets_own_with_one_accumulation_step(base: int, enabled: bool) -> None:
    """With more, an update has more images than mmdet counts."""
    change = {"auto_scale_lr": ConfigDict(enable=enabled, base_batch_size=base), "optimizer.lr": 0.02}
    plan, cfg = planned({"train_micro_batch_size_per_gpu": 8}, change)
    plain = read_config(None, {**change, "data.samples_per_gpu": 8})
    plain.gpu_ids = range(2)
    auto_scale_lr(plain, False, logging.getLogger("tests"))
    assert plan.batch.accumulation == 1
    assert cfg.optimizer.lr == plain.optimizer.lr == 0.02 * (16 / base if enabled else 1)


def test_the_rate_is_not_scaled_unless_asked_or_when_the_json_has_it() -> None:
    change = {"auto_scale_lr": ConfigDict(enable=False, base_batch_size=64), "optimizer.lr": 0.02}
    assert planned({}, change)[1].optimizer.lr == 0.02
    plan, cfg = planned({"optimizer": JSON_OPTIMIZER}, change, scale_rate=True)
    assert cfg.optimizer.lr == 0.02 and plan.deepspeed["optimizer"] == JSON_OPTIMIZER
    assert any(note.startswith("auto_scale_lr is set aside") for note in plan.notes)


def test_scaling_without_a_base_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no auto_scale_lr.base_batch_size"):
        planned({}, scale_rate=True)


LIMITS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "runner": ({}, {"runner.type": "DynamicIterBasedRunner"}, "runner.type = 'DynamicIterBasedRunner': allowed:"),
    "workflow": ({}, {"workflow": [("val", 1)]}, "its phases must be 'train'"),
    "resume_from": ({}, {"resume_from": "epoch_1.pth"}, "resume_from = 'epoch_1.pth': a .pth has no optimizer state"),
    "EMA on disk": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        {"custom_hooks": [{"type": "EMAHook"}]},
        "EMAHook: offload_optimizer.device nvme leaves no fp32 weights in memory",
    ),
    "EMA resume": (
        {},
        {"custom_hooks": [{"type": "EMAHook", "resume_from": "x.pth"}]},
        "--resume brings the averages back",
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_what_cannot_be_done_is_refused_with_the_reason(name: str) -> None:
    settings, change, said = LIMITS[name]
    plan, cfg = planned(settings, change)
    with pytest.raises(ConfigError) as caught:
        refuse_unsupported(cfg, plan)
    assert said in str(caught.value)


def test_what_can_be_done_is_not_refused() -> None:
    settings = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    plan, cfg = planned(settings, {"custom_hooks": [{"type": "EMAHook"}], "auto_resume": True})
    refuse_unsupported(cfg, plan)
    assert any("auto_resume is set aside" in note for note in plan.notes)
    assert not any("EMAHook" in note for note in plan.notes)


def test_averages_without_epochs_are_noted() -> None:
    runner = {"type": "IterBasedRunner", "max_iters": 5}
    plan, cfg = planned({}, {"custom_hooks": [{"type": "EMAHook"}], "runner": runner})
    refuse_unsupported(cfg, plan)
    assert any(note.startswith("custom hook EMAHook: an IterBasedRunner has no epochs") for note in plan.notes)


def test_data_root_on_the_command_line_moves_the_data(tmp_path: Any) -> None:
    """Once data were made there and read elsewhere. A path given by itself stays."""
    cfg = read_config(None, {"data_root": str(tmp_path), "data.val.img_prefix": "elsewhere/"})
    assert cfg.data.train.ann_file == f"{tmp_path}/annotations/train.json"
    assert cfg.data.test.img_prefix == f"{tmp_path}/val/"
    assert cfg.data.val.img_prefix == "elsewhere/"
    assert cfg.data_root == str(tmp_path)
