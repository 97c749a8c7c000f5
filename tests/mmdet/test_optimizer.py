"""The groups that a run's optimizer gets: paramwise_cfg inside each module, whoever names the optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmcv import Config
from torch import nn

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.configs import read_config
from agvm_ds.mmdet.optimizer import OptimizerSetup, build, paramwise_groups, replaced, settings_of
from agvm_ds.mmdet.plan import make_plan

AGVM = {"precondition": "none"}


class Net(nn.Module):
    """Two modules with a norm each, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.head = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4))


class ConvNeXt(nn.Module):
    """The names by which mmdet's layer-wise constructor knows depths."""

    def __init__(self) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(4)])
        self.stages = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)]) for _ in range(4)])


class LayerNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = ConvNeXt()
        self.head = nn.Linear(2, 2)


def config(**optimizer: Any) -> Config:
    cfg = read_config(None)
    cfg.optimizer = optimizer
    return cfg


def made(cfg: Config, block: dict[str, Any] | None, agvm: bool = True, net: nn.Module | None = None) -> OptimizerSetup:
    settings: dict[str, Any] = {"train_batch_size": 16, **({"optimizer": block} if block else {})}
    plan = make_plan(settings | ({"agvm": AGVM} if agvm else {}), cfg, ranks=2)
    return build(net or Net(), cfg, plan)


def rates(setup: OptimizerSetup) -> dict[str, tuple[float, float]]:
    return {group["name"]: (group["lr"], group["weight_decay"]) for group in setup.groups}


PARAMWISE = {"norm_decay_mult": 0.0, "bias_lr_mult": 2.0, "custom_keys": {"backbone.0": {"lr_mult": 0.1}}}


BLOCKS = pytest.mark.parametrize(
    "block", [None, {"type": "SGD", "params": {"lr": 0.5, "weight_decay": 0.01}}], ids=["config", "json"]
)


@BLOCKS
def test_paramwise_settings_are_kept_within_each_module(block: dict[str, Any] | None) -> None:
    """Five parameters with equal settings in a module would be one group; here the norm's weight and bias are."""
    cfg = config(type="SGD", lr=0.5, weight_decay=0.01, paramwise_cfg=PARAMWISE)
    setup = made(cfg, block)
    assert rates(setup) == {
        "backbone#0": (0.05, 0.01),
        "backbone#1": (0.5, 0.0),
        "head#0": (0.5, 0.01),
        "head#1": (1.0, 0.01),
        "head#2": (0.5, 0.0),
    }
    assert [len(group["params"]) for group in setup.groups] == [1, 2, 1, 1, 2]
    assert setup.optimizer is not None


@BLOCKS
def test_with_agvm_off_the_groups_are_settings_alone(block: dict[str, Any] | None) -> None:
    """Once four groups of the demo's one: ten percent of its updates under ZeRO 2."""
    cfg = config(type="SGD", lr=0.5, weight_decay=0.01, paramwise_cfg=PARAMWISE)
    setup = made(cfg, block, agvm=False)
    assert list(rates(setup).values()) == [(0.05, 0.01), (0.5, 0.0), (0.5, 0.01), (1.0, 0.01)]
    assert [len(group["params"]) for group in setup.groups] == [1, 4, 1, 1]
    assert (setup.optimizer is None) == (block is not None)  # then DeepSpeed builds it
    assert len(made(config(type="SGD", lr=0.5), None, agvm=False).groups) == 1


@pytest.mark.parametrize(
    ("kind", "params", "plain"),
    [
        ("SGD", {}, (1e-3, 0.0)),
        ("AdamW", {}, (1e-3, 0.0)),
        ("AdamW", {"torch_adam": True}, (1e-3, 0.01)),
        ("Lion", {"lr": 0.1}, (0.1, 0.0)),
    ],
)
def test_what_the_json_leaves_out_is_the_default_of_what_deepspeed_builds(
    kind: str, params: dict[str, Any], plain: tuple[float, float]
) -> None:
    """The multipliers act on it too: once a raw ValueError (no weight_decay), or a multiplier lost (no lr)."""
    cfg = config(type="SGD", lr=0.5, paramwise_cfg={"norm_decay_mult": 0.5, "bias_lr_mult": 2.0})
    lr, decay = plain
    net = Net()
    groups = made(cfg, {"type": kind, "params": params}, agvm=False, net=net).groups
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found[id(net.head[0].weight)] == (lr, decay)
    assert found[id(net.head[0].bias)] == (2 * lr, decay)
    assert found[id(net.head[1].weight)] == (lr, 0.5 * decay)


def test_each_parameter_has_the_same_settings_with_agvm_on_and_off() -> None:
    cfg, net = config(type="SGD", lr=0.5, weight_decay=0.01, paramwise_cfg=PARAMWISE), Net()
    on, off = (
        {
            id(p): (group["lr"], group["weight_decay"])
            for group in made(cfg, None, agvm, net).groups
            for p in group["params"]
        }
        for agvm in (True, False)
    )
    assert on == off and len(on) == 7


def test_layer_wise_decay_is_kept() -> None:
    cfg = config(
        type="AdamW",
        lr=1.0,
        weight_decay=0.5,
        constructor="LearningRateDecayOptimizerConstructor",
        paramwise_cfg={"decay_rate": 0.5, "decay_type": "stage_wise", "num_layers": 6},
    )
    found = rates(made(cfg, None, net=LayerNet()))
    assert {rate for rate, _ in found.values()} == {0.5**depth for depth in (7, 6, 5, 4, 3, 0)}
    assert {decay for _, decay in found.values()} == {0.0, 0.5}


def test_a_constructor_that_cannot_is_a_message() -> None:
    with pytest.raises(ConfigError, match=r"paramwise_cfg or .constructor: ValueError: .*base_wd should not be None"):
        paramwise_groups(Net(), {"paramwise_cfg": {"norm_decay_mult": 0.0}}, {"lr": 0.1})
    with pytest.raises(ConfigError, match="the config's optimizer: .*nestrov"):
        made(config(type="SGD", lr=0.1, nestrov=True), None, agvm=False)
    with pytest.raises(ConfigError, match="mmcv knows no optimizer of that name"):
        made(config(type="SGDD", lr=0.1), None)


def test_frozen_parameters_are_in_no_group() -> None:
    net = Net()
    net.backbone[0].weight.requires_grad_(False)
    setup = made(config(type="SGD", lr=0.5, paramwise_cfg=PARAMWISE), None, net=net)
    assert isinstance(setup.optimizer, torch.optim.Optimizer)
    assert sum(len(group["params"]) for group in setup.groups) == 6


def test_settings_that_a_checkpoint_replaces_are_named_and_those_that_a_schedule_moves_are_not() -> None:
    mine = settings_of([{"params": [], "lr": 0.19, "initial_lr": 0.19, "momentum": 0.9, "weight_decay": 0.1}] * 2)
    moved = {"params": [], "lr": 0.02, "momentum": 0.8, "initial_momentum": 0.9, "weight_decay": 0.1, "step": 7}
    assert replaced(mine, settings_of([{**moved, "initial_lr": 0.19}] * 2)) == []
    others = [{**moved, "initial_lr": 0.38}, {**moved, "initial_lr": 0.76, "weight_decay": 0.0}]
    assert replaced(mine, settings_of(others)) == ["lr = 0.38 (0.19)", "weight_decay = 0.0 (0.1)"]
