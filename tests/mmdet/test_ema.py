"""A config's hooks of averaged weights are exchanged; what they average: tests/distributed/test_averages.py."""

from __future__ import annotations

import pytest
from mmcv.runner import HOOKS
from mmcv.utils import build_from_cfg

from agvm_ds.mmdet.ema import EMA_HOOKS, EngineEMA, ema_hooks, engine_hooks


@pytest.mark.parametrize("kind", EMA_HOOKS)
def test_the_hook_is_the_one_named_with_its_rule(kind: str) -> None:
    hook = build_from_cfg(engine_hooks([{"type": kind, "momentum": 0.3}])[0], HOOKS)
    assert isinstance(hook, EngineEMA) and isinstance(hook, HOOKS.get(kind))
    assert hook.momentum == 0.3
    assert ema_hooks([object(), hook]) == [hook]


def test_other_hooks_are_left_as_they_are() -> None:
    given = [{"type": "NumClassCheckHook"}, {"type": "EMAHook", "momentum": 0.1}]
    assert engine_hooks(given) == [given[0], {"type": "EngineEMAHook", "momentum": 0.1}]
    assert engine_hooks(None) == []
    assert engine_hooks(given[0]) == [given[0]]
