"""Averaged weights (YOLOX has them) at another batch: their hooks count updates, of which an epoch then has fewer or more."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Any

from mmcv import Config
from mmdet.core.hook import ExpMomentumEMAHook

from agvm_ds.mmdet.configs import listed
from agvm_ds.mmdet.hooks.custom import EMA_HOOKS, class_of
from agvm_ds.mmdet.plan import Batch
from agvm_ds.mmdet.planning.request import Row

BEGINNING = ("total_iter", "warm_up")
"""Arguments that say in how many updates an average comes to its momentum."""


@dataclass(frozen=True)
class Averages:
    """``changes``: ``--cfg-options``."""

    changes: dict[str, Any]
    rows: list[Row]


def scaled_averages(cfg: Config, base: int, batch: Batch) -> Averages:
    """The average remembers as many images: 1 - (1 - momentum)^(batch / base), and its beginning x base / batch updates."""
    hooks, found = cfg.get("custom_hooks"), Averages({}, [])
    for index, hook in enumerate(listed(hooks)):
        kind = class_of(hook)
        if kind not in EMA_HOOKS:
            continue
        known = {
            name: one.default
            for each in reversed(kind.__mro__)
            for name, one in signature(each.__init__).parameters.items()
        }
        given = {name: hook.get(name, known.get(name)) for name in ("momentum", *BEGINNING)}
        # mmcv's, and mmdet's that is made like it, take a power of the momentum.
        power = 1 if kind is ExpMomentumEMAHook else hook.get("interval", 1)
        share = 1 - (1 - given["momentum"] ** power) ** (batch.train / base)
        momentum = float(f"{share ** (1 / power):.4g}")
        begun = {name: max(round(given[name] * base / batch.train), 1) for name in BEGINNING if given[name] is not None}
        times = f"{batch.train} / {base}"
        place = f"custom_hooks.{index}" if isinstance(hooks, (list, tuple)) else "custom_hooks"
        found.changes.update({f"{place}.{name}": value for name, value in {"momentum": momentum, **begun}.items()})
        found.rows.append(
            Row(
                f"{kind.__name__}'s momentum",
                f"{momentum:g}",
                f"the config's {given['momentum']:g}: as many images remembered, 1 - (1 - m)^({times})",
            )
        )
    return found
