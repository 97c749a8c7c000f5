"""A config's learning rate, epochs and warm-up for another batch: the figures, and the ``--cfg-options`` that bring them."""

from __future__ import annotations

import math
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcv import Config
from mmcv.runner import HOOKS
from mmcv.runner.hooks import LrUpdaterHook
from mmdet.datasets import build_dataset

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.configs import blamed
from agvm_ds.mmdet.plan import Batch
from agvm_ds.mmdet.planning import scaling
from agvm_ds.mmdet.planning.memory import values_of
from agvm_ds.mmdet.planning.request import Request, Row

COCO_FILE = "instances_train2017.json"
BY_UPDATES = ("evaluation.interval", "checkpoint_config.interval", "log_config.interval")


def training_images(cfg: Config, given: int | None) -> tuple[int, str]:
    """(images that an epoch has, where the figure is from). Raises ConfigError where nobody knows."""
    if given is not None:
        return given, "--images"
    files = [Path(file) for file in values_of(cfg.data.train, "ann_file") if isinstance(file, str)]
    if files and all(file.is_file() for file in files):
        with blamed("data.train"), redirect_stdout(sys.stderr):  # pycocotools talks
            return len(build_dataset(cfg.data.train)), f"counted, as mmdet trains on them: {', '.join(map(str, files))}"
    alone = isinstance(cfg.data.train, dict) and isinstance(cfg.data.train.get("ann_file"), str)
    if alone and files[0].name == COCO_FILE:
        filtered = cfg.data.train.get("filter_empty_gt", True)
        kind = "COCO train2017's with annotations" if filtered else "COCO train2017's, filter_empty_gt is off"
        return scaling.COCO_IMAGES if filtered else scaling.COCO_ALL_IMAGES, f"{kind}; {files[0]} is not here to count"
    missing = ", ".join(str(file) for file in files if not file.is_file()) or "data.train names no annotation file"
    raise ConfigError(f"--images is needed to count updates: the annotation file is not here: {missing}")


def published_rate(cfg: Config, batch: int, images: int) -> float | None:
    """The official AGVM rate for this detector (ResNet-50, FPN, SGD), batch and data (COCO train2017), if there is one."""
    model = cfg.model
    backbone, neck = model.get("backbone") or {}, model.get("neck") or {}
    kinds = backbone.get("type"), backbone.get("depth"), neck.get("type") if isinstance(neck, dict) else None
    if kinds != ("ResNet", 50, "FPN") or cfg.optimizer.get("type") != "SGD" or images != scaling.COCO_IMAGES:
        return None
    return scaling.PUBLISHED.get((model.type, batch))


def base_batch(cfg: Config, given: int | None) -> tuple[int, str]:
    """(images for which the config's rate is meant, where the figure is from). Raises ConfigError where nobody knows."""
    if given is not None:
        return given, "--base-batch"
    base = (cfg.get("auto_scale_lr") or {}).get("base_batch_size")
    if base is None:
        raise ConfigError(
            "--base-batch is needed: the config has no auto_scale_lr.base_batch_size, so that nobody knows for which batch "
            "its learning rate is meant (mmdet's usual 8 GPUs x 2 images: 16)"
        )
    return int(base), "auto_scale_lr.base_batch_size"


@dataclass(frozen=True)
class Rate:
    """The learning rate of the run; ``published``: by the official recipe, with its epochs."""

    value: float
    published: bool
    rows: list[Row]


def learning_rate(request: Request, cfg: Config, images: int) -> Rate:
    """The published rate where there is one and no rule is asked for; else by the rule asked for, or the optimizer's."""
    base, source = base_batch(cfg, request.base_batch)
    own = cfg.optimizer.get("lr")
    if own is None:
        raise ConfigError("optimizer.lr: the config has none to scale")
    published = published_rate(cfg, request.batch, images)
    rule = request.scaling or scaling.default_rule(cfg.optimizer.type)
    by_rule = {name: scaling.scaled_rate(own, base, request.batch, name) for name in scaling.RULES}
    chosen = published is not None and request.scaling is None
    value = published if published is not None and chosen else by_rule[rule]
    why = f"official AGVM recipe of {cfg.model.type} at {request.batch}" if chosen else f"{rule}: {scaling.RULES[rule]}"
    rows = [Row("learning rate", f"{value:.6g}", f"{why}; the config: {own:g} at {base} ({source})")]
    rows += [
        Row(f"- by {name}", f"{rate:.6g}", f"--scaling {name}: {scaling.RULES[name]}")
        for name, rate in by_rule.items()
        if chosen or name != rule
    ]
    if published is not None and not chosen:
        rows.append(
            Row("- published", f"{published:.6g}", f"official AGVM recipe of {cfg.model.type} at {request.batch}")
        )
    return Rate(value, chosen, rows)


@dataclass(frozen=True)
class Schedule:
    """``updates`` in all; ``changes``: ``--cfg-options``."""

    updates: int
    changes: dict[str, Any]
    rows: list[Row]


def schedule(cfg: Config, rate: Rate, images: int, base: int, batch: Batch, warmup: int) -> Schedule:
    """Epochs, steps and warm-up of a run.

    A run by epochs keeps the config's, or has the official recipe's with its rate. What counts iterations, which are updates
    here, is multiplied by base / batch: as many images.
    """
    changes: dict[str, Any] = {} if (cfg.get("lr_config") or {}).get("policy") else {"lr_config.policy": "fixed"}
    lr = cfg.get("lr_config") or {}
    own = warms_up_its_own_way(lr.get("policy", "fixed"))
    changes |= {"lr_config.warmup": "exp", "lr_config.warmup_iters": warmup}
    changes |= {} if own else {"lr_config.warmup_ratio": scaling.WARMUP_RATIO}
    if lr.get("warmup_by_epoch"):
        changes["lr_config.warmup_by_epoch"] = False
    warm_up = Row(
        "warm-up",
        f"{warmup} updates",
        f"{scaling.WARMUP_EPOCHS} epochs, rounded up to tens: official AGVM recipes; "
        + (f"as {own} has it" if own else f"exponential from ratio {scaling.WARMUP_RATIO}: the same"),
    )
    epoch = math.ceil(images / (batch.micro * batch.ranks)) // batch.accumulation
    if cfg.runner.type == "IterBasedRunner":
        total = _fewer(cfg.runner.max_iters, base, batch)
        changes |= {"runner.max_iters": total, **_iterations(cfg, base, batch)}
        rows = [
            Row("updates", str(total), f"the config's {cfg.runner.max_iters} x {base} / {batch.train}: as many images"),
            warm_up,
        ]
        return Schedule(total, changes, rows)
    epochs, why = int(cfg.runner.max_epochs), "the config's"
    if rate.published:
        epochs, why = scaling.PUBLISHED_EPOCHS, "official AGVM recipe, with lr_config.step = [12, 14]"
        changes |= {"runner.max_epochs": epochs, "lr_config.policy": "step", "lr_config.step": scaling.PUBLISHED_STEPS}
    elif lr.get("by_epoch") is False:
        changes |= _steps(lr, base, batch)
    filled = f"{images:,} / ({batch.ranks} GPUs x {batch.micro}), rounded up as mmdet's sampler fills up"
    why_epoch = f"{filled}; / {batch.accumulation}, rounded down"
    rows = [
        Row("epochs", str(epochs), why),
        Row("updates an epoch", str(epoch), why_epoch),
        Row("updates", str(epochs * epoch), "epochs x updates an epoch"),
        warm_up,
    ]
    return Schedule(epochs * epoch, changes, rows)


def warms_up_its_own_way(policy: str) -> str | None:
    """The name of a policy's class that does not warm up as mmcv's do (YOLOX's takes the ratio for a factor throughout)."""
    kind = HOOKS.get(f"{policy.title() if policy == policy.lower() else policy}LrUpdaterHook")  # as mmcv names it
    own = kind is not None and kind.get_warmup_lr is not LrUpdaterHook.get_warmup_lr
    return kind.__name__ if own else None


def _iterations(cfg: Config, base: int, batch: Batch) -> dict[str, Any]:
    """The config's intervals and steps that count iterations."""
    found = {}
    for key in BY_UPDATES:
        block, name = key.split(".")
        value = (cfg.get(block) or {}).get(name)
        if isinstance(value, int):
            found[key] = _fewer(value, base, batch)
    return {**found, **_steps(cfg.get("lr_config") or {}, base, batch)}


def _steps(lr: dict[str, Any], base: int, batch: Batch) -> dict[str, Any]:
    step = lr.get("step")
    if isinstance(step, (list, tuple)):
        return {"lr_config.step": [_fewer(value, base, batch) for value in step]}
    return {} if step is None else {"lr_config.step": _fewer(step, base, batch)}


def _fewer(iterations: int, base: int, batch: Batch) -> int:
    """Iterations of ``base`` images -> updates with as many, at least one."""
    return max(round(iterations * base / batch.train), 1)
