"""The optimizer of a run: from the DeepSpeed JSON if it names one, else from the mmdet config; AGVM around it or not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import torch
from deepspeed.ops.adam import FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import FusedLion
from mmcv import Config
from mmcv.runner import OPTIMIZERS
from mmdet.core.optimizers.builder import build_optimizer_constructor
from torch import nn

from agvm_ds.bases import base_from_json
from agvm_ds.config import ConfigError
from agvm_ds.engine import make_optimizer
from agvm_ds.groups import PARAMS, Group, cut_groups
from agvm_ds.mmdet.detector.modules import modules_of
from agvm_ds.mmdet.plan import Plan


@dataclass(frozen=True)
class OptimizerSetup:
    """What ``agvm_ds.initialize`` is given: an optimizer, or (DeepSpeed builds the JSON's own) only groups."""

    optimizer: torch.optim.Optimizer | None
    groups: list[Group]


def build(detector: nn.Module, cfg: Config, plan: Plan) -> OptimizerSetup:
    """Cut the detector into modules and settings, and make its optimizer. Raises ConfigError.

    With AGVM off into settings alone: every group costs DeepSpeed a norm, a gather and a step in each update, and plain
    DeepSpeed has no use for modules.
    """
    block, own = plan.deepspeed.get("optimizer"), cfg.get("optimizer") or {}
    if block:
        given = {**defaults_of(deepspeed_class(block)), **(block.get("params") or {})}
    else:
        base, options = base_from_config(own)
        given = {**defaults_of(base), **options}
    modules = {} if plan.agvm is None else plan.agvm.modules or modules_of(detector)
    groups = cut_groups(paramwise_groups(detector, own, given), detector, modules)
    if block and plan.agvm is None:
        return OptimizerSetup(None, groups)
    if block:
        base, options = base_from_json(plan.deepspeed)
    if plan.agvm is not None:
        return OptimizerSetup(make_optimizer(groups, base, options), groups)
    try:
        return OptimizerSetup(base(groups, **options), groups)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the config's optimizer: {error}") from None


def paramwise_groups(detector: nn.Module, optimizer: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Group]:
    """One group a parameter with the rate and decay that the config's ``paramwise_cfg`` and ``constructor`` give it.

    settings: where the base ``lr`` and ``weight_decay`` come from. The constructor wants to build an optimizer; SGD
    costs nothing, and only its groups are used.
    """
    rates = {key: settings[key] for key in RATES if key in settings}
    constructor = {
        "type": optimizer.get("constructor", "DefaultOptimizerConstructor"),
        "optimizer_cfg": {"type": "SGD", **({"lr": 1.0} | rates)},
        "paramwise_cfg": optimizer.get("paramwise_cfg"),
    }
    try:
        made = build_optimizer_constructor(constructor)(detector).param_groups
    except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        raise ConfigError(f"optimizer.paramwise_cfg or .constructor: {type(error).__name__}: {error}") from error
    return [{PARAMS: group["params"]} | {key: group[key] for key in rates} for group in made]


RATES = ("lr", "weight_decay")
"""The settings that differ from group to group."""


def defaults_of(base: type[torch.optim.Optimizer] | None) -> dict[str, Any]:
    """The rate and decay that a class has where nobody gives one; ``paramwise_cfg`` multiplies them too."""
    known = signature(base).parameters if base is not None else {}
    return {key: known[key].default for key in RATES if key in known and known[key].default is not Parameter.empty}


def deepspeed_class(block: Mapping[str, Any]) -> type[torch.optim.Optimizer] | None:
    """The class of which DeepSpeed takes the defaults for an ``optimizer`` block; None if it is not known here."""
    name, params = str(block.get("type")).lower(), block.get("params") or {}
    if name in ("adam", "adamw") and not params.get("torch_adam"):
        return FusedAdam
    others = {"lamb": FusedLamb, "lion": FusedLion}
    by_name = {key.lower(): value for key, value in vars(torch.optim).items() if isinstance(value, type)}
    return others.get(name) or by_name.get(name)


def base_from_config(optimizer: Mapping[str, Any]) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """(class, its arguments) of an mmdet config's ``optimizer``."""
    options = {key: value for key, value in optimizer.items() if key not in ("type", "paramwise_cfg", "constructor")}
    base = OPTIMIZERS.get(str(optimizer.get("type")))
    if base is None:
        raise ConfigError(f"optimizer.type = {optimizer.get('type')!r}: mmcv knows no optimizer of that name")
    return base, options


def settings_of(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each parameter group's settings as they were given: of one that a schedule moves, the value that it began with."""
    return [
        {key: group.get(f"initial_{key}", value) for key, value in group.items() if key not in MOVING}
        for group in groups
    ]


MOVING = (PARAMS, "step", "initial_lr", "initial_momentum", "initial_betas")
"""What is in a group and is no setting."""


def replaced(before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]]) -> list[str]:
    """In words, the settings that are others now, each with the first group that shows it."""
    words: dict[str, str] = {}
    for mine, now in zip(before, after, strict=True):
        for key in mine.keys() & now.keys():
            if now[key] != mine[key]:
                words.setdefault(key, f"{key} = {now[key]} ({mine[key]})")
    return [words[key] for key in sorted(words)]
