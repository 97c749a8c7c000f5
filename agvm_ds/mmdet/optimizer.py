"""The optimizer of a run: from the DeepSpeed JSON if it names one, else from the mmdet config; AGVM around it or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmcv import Config
from mmcv.runner import OPTIMIZERS, build_optimizer_constructor
from torch import nn

from agvm_ds.bases import base_from_json
from agvm_ds.config import ConfigError
from agvm_ds.engine import make_optimizer
from agvm_ds.groups import PARAMS, Group, cut_groups
from agvm_ds.mmdet.modules import modules_of
from agvm_ds.mmdet.plan import Plan


@dataclass(frozen=True)
class OptimizerSetup:
    """What ``agvm_ds.initialize`` is given: an optimizer, or (DeepSpeed builds the JSON's own) only groups."""

    optimizer: torch.optim.Optimizer | None
    groups: list[Group]


def build(detector: nn.Module, cfg: Config, plan: Plan) -> OptimizerSetup:
    """Cut the detector into modules and settings, and make its optimizer. Raises ConfigError.

    The groups are the same with AGVM on and off, so that a baseline differs from it in nothing else.
    """
    block = plan.deepspeed.get("optimizer")
    if block:
        plan.notes.append(
            f"optimizer {block.get('type')} from the DeepSpeed JSON; the config's {cfg.optimizer.type} is set aside"
        )
    else:
        plan.notes.append(f"optimizer {cfg.optimizer.type} from the mmdet config")
    chosen = plan.agvm.modules if plan.agvm is not None else None
    settings = block.get("params", {}) if block else cfg.optimizer
    groups = cut_groups(paramwise_groups(detector, cfg.optimizer, settings), detector, chosen or modules_of(detector))
    if block and plan.agvm is None:
        return OptimizerSetup(None, groups)
    base, options = base_from_json(plan.deepspeed) if block else base_from_config(cfg.optimizer)
    if plan.agvm is not None:
        return OptimizerSetup(make_optimizer(groups, base, options), groups)
    return OptimizerSetup(base(groups, **options), groups)


def paramwise_groups(detector: nn.Module, optimizer: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Group]:
    """One group a parameter with the rate and decay that the config's ``paramwise_cfg`` and ``constructor`` give it.

    settings: where the base ``lr`` and ``weight_decay`` come from. The constructor wants to build an optimizer; SGD
    costs nothing, and only its groups are used.
    """
    rates = {key: settings[key] for key in ("lr", "weight_decay") if key in settings}
    constructor = build_optimizer_constructor(
        {
            "type": optimizer.get("constructor", "DefaultOptimizerConstructor"),
            "optimizer_cfg": {"type": "SGD", **({"lr": 1.0} | rates)},
            "paramwise_cfg": optimizer.get("paramwise_cfg"),
        }
    )
    return [
        {PARAMS: group["params"]} | {key: group[key] for key in rates} for group in constructor(detector).param_groups
    ]


def base_from_config(optimizer: Mapping[str, Any]) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """(class, its arguments) of an mmdet config's ``optimizer``."""
    options = {key: value for key, value in optimizer.items() if key not in ("type", "paramwise_cfg", "constructor")}
    base = OPTIMIZERS.get(optimizer["type"])
    if base is None:
        raise ConfigError(f"optimizer.type = {optimizer['type']!r}: mmcv knows no optimizer of that name")
    return base, options
