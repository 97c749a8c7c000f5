"""A config's ``custom_hooks``: for those of mmcv and mmdet that read or write weights, the ones here that know the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmcv.runner import HOOKS
from mmcv.runner.hooks import CheckpointHook, EMAHook
from mmdet.core.hook import ExpMomentumEMAHook, LinearMomentumEMAHook
from mmdet.core.hook.ema import BaseEMAHook

from agvm_ds.mmdet.configs import listed
from agvm_ds.mmdet.hooks.checkpoints import EngineCheckpointHook
from agvm_ds.mmdet.hooks.ema import EngineEMAHook, EngineExpMomentumEMAHook, EngineLinearMomentumEMAHook

EMA_HOOKS: Mapping[type, type] = {
    EMAHook: EngineEMAHook,
    ExpMomentumEMAHook: EngineExpMomentumEMAHook,
    LinearMomentumEMAHook: EngineLinearMomentumEMAHook,
}
"""mmcv's and mmdet's -> the one to use here."""
ENGINE_HOOKS: Mapping[type, type] = {CheckpointHook: EngineCheckpointHook, **EMA_HOOKS}


def class_of(hook: Mapping[str, Any]) -> Any:
    """A config's hook's class, which it names in mmcv's registry, with a scope or without, or gives; None if unknown."""
    kind = hook.get("type")
    if not isinstance(kind, str):
        return kind
    scope, name = HOOKS.split_scope_key(kind)
    return HOOKS.get(name) if scope in (None, HOOKS.scope) else None


def engine_hook(hook: Mapping[str, Any]) -> dict[str, Any]:
    """A hook's config, of the type to use here."""
    mine = ENGINE_HOOKS.get(class_of(hook))
    return dict(hook) if mine is None else {**hook, "type": mine.__name__}


def engine_hooks(custom_hooks: Any) -> list[dict[str, Any]]:
    """The same of a config's ``custom_hooks``."""
    return [engine_hook(hook) for hook in listed(custom_hooks)]


def unknown_kinds(custom_hooks: Any) -> Iterator[str]:
    """Words about each hook that is derived from one of these, and would save or average in its own way."""
    for kind in map(class_of, listed(custom_hooks)):
        if (
            isinstance(kind, type)
            and issubclass(kind, (CheckpointHook, EMAHook, BaseEMAHook))
            and kind not in ENGINE_HOOKS
        ):
            allowed = ", ".join(one.__name__ for one in ENGINE_HOOKS)
            yield (
                f"custom hook {kind.__name__}: saves or averages weights that are cut over the ranks here; of this kind "
                f"are allowed: {allowed}"
            )
