"""mmdet's averages, kept beside the model: the same numbers, without the buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmcv.runner import HOOKS
from mmcv.utils import build_from_cfg
from torch import nn

from agvm_ds.mmdet.ema import EMA_HOOKS, EngineEMA, ema_hooks, engine_hooks, trained_weights


class Runner:
    """As much of a runner as the hooks read."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.model: Any = self.net
        self.iter = 0


def train(runner: Runner, hook: Any, epochs: int) -> None:
    for _ in range(epochs):
        hook.before_train_epoch(runner)
        for _ in range(3):
            with torch.no_grad():
                for parameter in runner.net.parameters():
                    parameter += runner.iter
            runner.net(torch.arange(6.0).view(2, 3) + runner.iter)
            hook.after_train_iter(runner)
            runner.iter += 1
        hook.after_train_epoch(runner)


def made(kind: str) -> tuple[Runner, Any]:
    """A runner whose model is a wrapper, as EngineModel is, and the hook as a config names it."""
    runner = Runner()
    runner.model = type("Model", (), {"module": runner.net})
    hook = build_from_cfg(engine_hooks([{"type": kind, "momentum": 0.3}])[0], HOOKS)
    hook.before_run(runner)
    return runner, hook


@pytest.mark.filterwarnings("ignore:This overload of add_:UserWarning")
@pytest.mark.parametrize("kind", EMA_HOOKS)
def test_an_epoch_ends_with_the_averages_that_the_original_hook_has(kind: str) -> None:
    other = Runner()
    original = build_from_cfg({"type": kind, "momentum": 0.3}, HOOKS)
    original.before_run(other)
    train(other, original, 2)
    runner, hook = made(kind)
    train(runner, hook, 2)
    found = runner.net.state_dict()
    expected = other.net.state_dict()
    assert any(name.startswith("ema_") for name in expected) and not any(name.startswith("ema_") for name in found)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    hook.before_train_epoch(runner)
    original.before_train_epoch(other)
    assert all(torch.equal(value, other.net.state_dict()[name]) for name, value in runner.net.state_dict().items())


def test_a_checkpoint_between_epochs_has_what_is_trained_and_the_averages() -> None:
    runner, hook = made("ExpMomentumEMAHook")
    train(runner, hook, 1)
    averages = {name: value.clone() for name, value in runner.net.state_dict().items()}
    with trained_weights([hook, object()]):
        trained = {name: value.clone() for name, value in runner.net.state_dict().items()}
        state = hook.state()
    assert all(torch.equal(value, averages[name]) for name, value in state.items())
    assert not torch.equal(trained["0.weight"], averages["0.weight"])
    assert torch.equal(runner.net.state_dict()["0.weight"], averages["0.weight"])


def test_a_resumed_run_has_the_averages_of_the_whole_run() -> None:
    runner, hook = made("ExpMomentumEMAHook")
    train(runner, hook, 1)
    again, resumed = made("ExpMomentumEMAHook")
    with trained_weights([hook]):
        again.net.load_state_dict(runner.net.state_dict())
        resumed.load_state(hook.state(), "cpu")
    resumed.before_run(again)
    again.iter = runner.iter
    train(runner, hook, 2)
    train(again, resumed, 2)
    assert all(torch.equal(value, again.net.state_dict()[name]) for name, value in runner.net.state_dict().items())


def test_other_hooks_are_left_as_they_are() -> None:
    given = [{"type": "NumClassCheckHook"}, {"type": "EMAHook", "momentum": 0.1}]
    assert engine_hooks(given) == [given[0], {"type": "EngineEMAHook", "momentum": 0.1}]
    assert engine_hooks(None) == []
    assert engine_hooks(given[0]) == [given[0]]
    assert [type(hook) for hook in ema_hooks([object(), made("EMAHook")[1]])] == [HOOKS.get("EngineEMAHook")]
    assert issubclass(HOOKS.get("EngineEMAHook"), EngineEMA)
