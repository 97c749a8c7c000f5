"""What a run does, settled before anything is built: batch arithmetic, clipping, schedule, precision.

A DeepSpeed JSON and an mmdet config both speak of these. The JSON goes first where it says something; what is set aside is
put on record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DtypeEnum
from mmcv import Config

from agvm_ds.bases import base_from_json, offloads
from agvm_ds.config import AGVMConfig, ConfigError, read_block
from agvm_ds.deepspeed_json import BATCH_KEYS
from agvm_ds.mmdet.detector.precision import TYPES
from agvm_ds.support import refuse_by_deepspeed, refuse_fp16


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
        """ "fp16" or "bf16" when the parameters are of that type; "bfloat16" is DeepSpeed's older key."""
        kinds = {"fp16": "fp16", "bf16": "bf16", "bfloat16": "bf16"}
        return next((kind for key, kind in kinds.items() if _enabled(self.deepspeed, key)), None)

    @property
    def computes(self) -> str | None:
        """The same of what layers compute in: with ``torch_autocast`` the parameters are fp32."""
        if not _enabled(self.deepspeed, "torch_autocast"):
            return self.half
        kind = DtypeEnum(self.deepspeed["torch_autocast"]["dtype"]).value
        return next((name for name, one in TYPES.items() if one == kind), None)


def make_plan(deepspeed_config: Mapping[str, Any], cfg: Config, ranks: int, scale_rate: bool = False) -> Plan:
    """Settle a DeepSpeed configuration and an mmdet config for this many ranks. Raises ConfigError.

    What is settled is written into ``cfg`` too. scale_rate: mmdet's ``--auto-scale-lr``.
    """
    block = read_block(deepspeed_config)
    refuse_by_deepspeed(deepspeed_config)
    batch = settle_batch(deepspeed_config, int(cfg.data.train_dataloader.get("samples_per_gpu", 2)), ranks)
    effective = {
        **deepspeed_config,
        "train_batch_size": batch.train,
        "train_micro_batch_size_per_gpu": batch.micro,
        "gradient_accumulation_steps": batch.accumulation,
    }
    plan = Plan(effective, batch, block, [str(batch)])
    cfg.data.train_dataloader.samples_per_gpu = batch.micro
    _settle_optimizer(plan, cfg)
    _settle_rate(plan, cfg, scale_rate)
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


def _settle_optimizer(plan: Plan, cfg: Config) -> None:
    if offloads(plan.deepspeed):  # the optimizer is made here as it is asked for: not to be questioned by DeepSpeed
        plan.deepspeed.setdefault("zero_force_ds_cpu_optimizer", False)
    block, own = plan.deepspeed.get("optimizer"), cfg.get("optimizer")
    if not block and not own:
        raise ConfigError("neither the DeepSpeed JSON nor the mmdet config names an optimizer")
    if not block:
        plan.notes.append(f"optimizer {own.type} from the mmdet config")
        return
    if plan.agvm is not None:
        base_from_json(plan.deepspeed)
    aside = f"; the config's {own.type} is set aside" if own else ""
    plan.notes.append(f"optimizer {block.get('type')} from the DeepSpeed JSON{aside}")


def _settle_rate(plan: Plan, cfg: Config, asked: bool) -> None:
    """mmdet's linear scaling: the config's rate, meant for ``base_batch_size`` images, times global batch / that."""
    scaling = cfg.get("auto_scale_lr") or {}
    if not asked and not scaling.get("enable"):
        return
    base = scaling.get("base_batch_size")
    if not base:
        raise ConfigError("auto_scale_lr: the config has no auto_scale_lr.base_batch_size to scale from")
    if plan.deepspeed.get("optimizer"):
        plan.notes.append("auto_scale_lr is set aside: the learning rate is the DeepSpeed JSON's")
        return
    if "lr" not in cfg.optimizer:
        raise ConfigError("auto_scale_lr: the config's optimizer has no lr to scale")
    rate = cfg.optimizer.lr
    cfg.optimizer.lr = rate * plan.batch.train / base
    plan.notes.append(f"auto_scale_lr: lr = {rate} x batch {plan.batch.train} / {base} = {cfg.optimizer.lr:.6g}")
    cfg.auto_scale_lr.enable = False  # done: the effective config must not do it again


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
    refuse_fp16(plan.deepspeed)
    if plan.half and (plan.deepspeed.get("zero_optimization") or {}).get("round_robin_gradients"):
        raise ConfigError(
            f"zero_optimization.round_robin_gradients with {plan.half}: DeepSpeed then finds others' fp32 weights, "
            "and those are published and evaluated here: leave it out"
        )
    if cfg.get("fp16"):
        plan.notes.append("the config's fp16 is set aside: precision comes from the DeepSpeed JSON")


def _enabled(config: Mapping[str, Any], key: str) -> bool:
    return bool((config.get(key) or {}).get("enabled", False))
