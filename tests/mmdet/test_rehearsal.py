"""A dry run's learning rates are those that mmcv's and mmdet's hooks set update by update."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mmdet.core  # noqa: F401 - registers YOLOX's
import pytest
import torch
from mmcv import Config
from mmcv.runner import HOOKS

from agvm_ds.mmdet.rehearsal import rate_rows

EPOCHS, PER_EPOCH = 4, 10
UPDATES = EPOCHS * PER_EPOCH
WARM_UP = {"warmup": "linear", "warmup_iters": 6, "warmup_ratio": 0.1}
POLICIES: dict[str, dict[str, Any]] = {
    "step": {"policy": "step", "step": [2, 3], **WARM_UP},
    "cosine by update": {"policy": "CosineAnnealing", "by_epoch": False, "min_lr": 1e-4, **WARM_UP},
    "warm-up by epoch": {"policy": "poly", "power": 0.9, **WARM_UP, "warmup_iters": 1, "warmup_by_epoch": True},
    "one cycle": {"policy": "OneCycle", "max_lr": 0.2},
    "cyclic": {"policy": "cyclic", "by_epoch": False, "cyclic_times": 2},
    "YOLOX": {"policy": "YOLOX", "num_last_epochs": 1, "min_lr_ratio": 0.05, "by_epoch": False}
    | {"warmup": "exp", "warmup_iters": 1, "warmup_ratio": 1, "warmup_by_epoch": True},
}


class Optimizer(torch.optim.SGD):
    """By whose class' name a cyclic policy takes its rates."""


def start(policy: dict[str, Any]) -> Any:
    """A runner with the policy's hook."""
    kind = policy["policy"]
    name = (kind.title() if kind == kind.lower() else kind) + "LrUpdaterHook"
    hook = HOOKS.get(name)(**{key: value for key, value in policy.items() if key != "policy"})
    optimizer = Optimizer([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer.param_groups[0]["initial_lr"] = 0.1
    return SimpleNamespace(_hooks=[hook], optimizer=optimizer, updates_per_epoch=PER_EPOCH)


def as_trained(policy: dict[str, Any]) -> list[float]:
    """The rate of every update of a run."""
    runner = start(policy)
    vars(runner).update(max_iters=UPDATES, max_epochs=EPOCHS, data_loader=range(PER_EPOCH))
    (hook,) = runner._hooks
    hook.before_run(runner)
    rates = []
    for runner.iter in range(UPDATES):
        runner.epoch = runner.iter // PER_EPOCH
        if runner.iter % PER_EPOCH == 0:
            hook.before_train_epoch(runner)
        hook.before_train_iter(runner)
        rates.append(runner.optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("name", POLICIES)
def test_the_rates_are_those_of_the_run(name: str) -> None:
    runner, cfg = start(POLICIES[name]), Config({"lr_config": POLICIES[name]})
    shown = {int(update): float(rate) for update, rate in rate_rows(runner, cfg, UPDATES)}
    trained = as_trained(POLICIES[name])
    assert {0, UPDATES - 1} <= set(shown) and len(shown) >= 5
    assert shown == {update: pytest.approx(trained[update], rel=1e-3) for update in shown}
    assert runner.optimizer.param_groups[0] == start(POLICIES[name]).optimizer.param_groups[0], (
        "the run's are untouched"
    )
