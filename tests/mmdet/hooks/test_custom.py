"""A config's hooks that touch weights are exchanged; what the averages average: tests/distributed/test_averages.py."""

from __future__ import annotations

from typing import Any

import pytest
from mmcv.runner import HOOKS, Hook
from mmcv.runner.hooks import CheckpointHook, EMAHook
from mmcv.utils import build_from_cfg

from agvm_ds.mmdet.hooks.checkpoints import EngineCheckpointHook
from agvm_ds.mmdet.hooks.custom import EMA_HOOKS, engine_hooks, unknown_kinds
from agvm_ds.mmdet.hooks.ema import EngineEMA, ema_hooks


@pytest.mark.parametrize("kind", EMA_HOOKS)
def test_the_hook_is_the_one_named_with_its_rule(kind: type) -> None:
    hook = build_from_cfg(engine_hooks([{"type": kind.__name__, "momentum": 0.3}])[0], HOOKS)
    assert isinstance(hook, EngineEMA) and isinstance(hook, kind)
    assert hook.momentum == 0.3
    assert ema_hooks([object(), hook]) == [hook]


@pytest.mark.parametrize("kind", ["EMAHook", "mmcv.EMAHook", EMAHook])
def test_a_type_may_have_a_scope_or_be_a_class(kind: Any) -> None:
    assert engine_hooks({"type": kind, "momentum": 0.1}) == [{"type": "EngineEMAHook", "momentum": 0.1}]


def test_one_more_hook_of_checkpoints_saves_on_every_rank() -> None:
    (hook,) = engine_hooks([{"type": "CheckpointHook", "interval": 5, "by_epoch": False}])
    built = build_from_cfg(hook, HOOKS)
    assert type(built) is EngineCheckpointHook and built.interval == 5


def test_other_hooks_are_left_as_they_are() -> None:
    given = [{"type": "NumClassCheckHook"}, {"type": "EMAHook", "momentum": 0.1}, {"type": "of.nobody"}, {"type": Hook}]
    found = engine_hooks(given)
    assert found == [given[0], {"type": "EngineEMAHook", "momentum": 0.1}, *given[2:]]
    assert engine_hooks(None) == []
    assert engine_hooks(given[0]) == [given[0]]


def test_a_hook_derived_from_one_of_them_is_told() -> None:
    class Mine(CheckpointHook):
        pass

    (said,) = unknown_kinds(
        [{"type": Mine}, {"type": "CheckpointHook"}, {"type": "NumClassCheckHook"}, {"type": "Nope"}]
    )
    assert said.startswith("custom hook Mine: saves or averages weights") and "EMAHook" in said
