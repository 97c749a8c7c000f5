"""What a run does, settled before anything is built: batch arithmetic, clipping, schedule, precision.

A DeepSpeed JSON and an mmdet config both speak of these. The JSON goes first where it says something; what is set aside is
put on record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deepspeed.accelerator import get_accelerator
from mmcv import Config

from agvm_ds.config import AGVMConfig, ConfigError, read_block


@dataclass(frozen=True)
class Batch:
    """train = micro x accumulation x ranks, in images."""

    train: int
    micro: int
    accumulation: int
    ranks: int

    def __str__(self) -> str:
        return (
            f"batch {self.train} = {self.micro} images a micro-batch x {self.accumulation} accumulation steps "
            f"x {self.ranks} ranks"
        )


@dataclass
class Plan:
    """A run's settled choices; ``deepspeed`` is the effective configuration, ``notes`` what the log should say."""

    deepspeed: dict[str, Any]
    batch: Batch
    agvm: AGVMConfig | None
    notes: list[str] = field(default_factory=list)

    @property
    def half(self) -> str | None:
        """ "fp16" or "bf16" when the parameters are of that type."""
        return next((key for key in ("fp16", "bf16") if _enabled(self.deepspeed, key)), None)


def make_plan(deepspeed_config: Mapping[str, Any], cfg: Config, ranks: int) -> Plan:
    """Settle a DeepSpeed configuration and an mmdet config for this many ranks. Raises ConfigError."""
    block = read_block(deepspeed_config)
    batch = settle_batch(deepspeed_config, int(cfg.data.train_dataloader.get("samples_per_gpu", 2)), ranks)
    effective = {
        **deepspeed_config,
        "train_batch_size": batch.train,
        "train_micro_batch_size_per_gpu": batch.micro,
        "gradient_accumulation_steps": batch.accumulation,
    }
    plan = Plan(effective, batch, block, [str(batch)])
    _settle_clipping(plan, cfg)
    _settle_schedule(plan, cfg)
    _refuse_precision(plan, cfg)
    if block is not None and ranks * batch.accumulation < 2:
        raise ConfigError(
            f"AGVM: an update has n = 1 micro-batch ({batch}), and the gradient variance needs at least 2: use more "
            "ranks, a larger train_batch_size, or a smaller micro-batch (data.samples_per_gpu, or "
            "train_micro_batch_size_per_gpu in the JSON)"
        )
    return plan


def settle_batch(config: Mapping[str, Any], samples_per_gpu: int, ranks: int) -> Batch:
    """The JSON decides the global batch; the mmdet config's samples_per_gpu is the micro-batch unless the JSON has one."""
    sizes = {key: config.get(key) for key in BATCH_KEYS}
    for key, value in sizes.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"{key} = {value!r}: must be an integer of at least 1")
    train, micro, accumulation = sizes.values()
    micro = micro or samples_per_gpu
    if train is None:
        accumulation = accumulation or 1
        return Batch(micro * accumulation * ranks, micro, accumulation, ranks)
    if train % (micro * ranks):
        raise ConfigError(
            f"train_batch_size = {train} does not divide into micro-batches: {micro} images x {ranks} ranks = "
            f"{micro * ranks} images a micro-step, and {train} / {micro * ranks} = {train / (micro * ranks):.3g}"
        )
    needed = train // (micro * ranks)
    if accumulation not in (None, needed):
        raise ConfigError(
            f"batch sizes disagree: train_batch_size = {train}, but {micro} images x {accumulation} accumulation steps "
            f"x {ranks} ranks = {micro * accumulation * ranks}"
        )
    return Batch(train, micro, needed, ranks)


BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def _settle_clipping(plan: Plan, cfg: Config) -> None:
    """``gradient_clipping``: the JSON's, else the config's grad_clip, else none (DeepSpeed's own default would be 1)."""
    hook = cfg.get("optimizer_config") or {}
    if "type" in hook:
        plan.notes.append(f"optimizer_config.type {hook['type']} set aside: DeepSpeed accumulates and steps")
    clip = hook.get("grad_clip") or {}
    if float(clip.get("norm_type", 2)) != 2:
        raise ConfigError(f"optimizer_config.grad_clip.norm_type = {clip['norm_type']}: DeepSpeed clips by the 2-norm")
    if "gradient_clipping" in plan.deepspeed:
        if clip:
            plan.notes.append("clipping from the DeepSpeed JSON; the config's grad_clip is set aside")
        return
    plan.deepspeed["gradient_clipping"] = float(clip.get("max_norm", 0.0))


def _settle_schedule(plan: Plan, cfg: Config) -> None:
    if plan.deepspeed.get("scheduler") and cfg.get("lr_config"):
        plan.notes.append("learning-rate schedule from the DeepSpeed JSON; the config's lr_config is set aside")
        cfg.lr_config = None


def _refuse_precision(plan: Plan, cfg: Config) -> None:
    if plan.half == "fp16" and get_accelerator().device_name() == "cpu":
        raise ConfigError('"fp16" needs a GPU; on a CPU use "bf16": {"enabled": true}, or neither for fp32')
    if cfg.get("fp16"):
        plan.notes.append("the config's fp16 is set aside: precision comes from the DeepSpeed JSON")


def _enabled(config: Mapping[str, Any], key: str) -> bool:
    return bool((config.get(key) or {}).get("enabled", False))
