"""What a run's numbers depend on beside its layout: kept with each checkpoint, and compared when a run is continued."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmcv import Config

from agvm_ds.mmdet.configs import moved
from agvm_ds.mmdet.detector.nonfinite import KEY
from agvm_ds.mmdet.plan import Plan

OF_CONFIG = ("model", "runner", "workflow", "lr_config", "momentum_config", "custom_hooks", KEY)
"""Keys of an mmdet config; the optimizer's settings are a checkpoint's own, and data.train, below its root, is one more."""
OF_JSON = ("gradient_clipping", "scheduler")
"""Keys of a DeepSpeed JSON; the ``agvm`` block is one more, without its modules, which are the layout's."""


def recipe_of(cfg: Config, plan: Plan) -> dict[str, Any]:
    """The settings of a run, by their names in its config and JSON."""
    block = {} if plan.agvm is None else {"agvm": plan.agvm.model_dump(mode="json", exclude={"modules"})}
    of_json = {key: plan.deepspeed[key] for key in OF_JSON if key in plan.deepspeed}
    root = cfg.get("data_root")
    data = moved(cfg.data.train, f"{root.rstrip('/')}/", "") if root else cfg.data.train
    of_config = {key: cfg[key] for key in OF_CONFIG if key in cfg} | {"data": {"train": data}}
    return copy.deepcopy({**of_config, **of_json, **block})  # mmcv takes blocks apart


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """A line each for what is another: "lr_config.step: [12, 14] before, [8, 11] now"."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            yield from differences(
                before.get(key, NOTHING), now.get(key, NOTHING), f"{name}.{key}" if name else str(key)
            )
    elif _blocks(before) and _blocks(now) and len(before) == len(now):
        for index, pair in enumerate(zip(before, now, strict=True)):
            yield from differences(*pair, f"{name}.{index}")
    elif before != now:
        yield f"{name}: {before!r} before, {now!r} now"


class _Nothing:
    def __repr__(self) -> str:
        return "nothing"


NOTHING = _Nothing()


def _blocks(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(one, Mapping) for one in value)
