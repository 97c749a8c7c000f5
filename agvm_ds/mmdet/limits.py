"""What an mmdet config may ask of plain mmdet and not of a run here: refused at start, with the reason."""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed.accelerator import get_accelerator
from mmcv import Config
from mmcv.ops import DeformConv2d, ModulatedDeformConv2d, MultiScaleDeformableAttention, SyncBatchNorm
from mmcv.runner.hooks import CheckpointHook
from mmdet.models import BaseDetector
from mmdet.models.dense_heads import EmbeddingRPNHead
from torch import nn

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.configs import listed, rebuilding
from agvm_ds.mmdet.detector.nonfinite import KEY
from agvm_ds.mmdet.hooks.custom import EMA_HOOKS, class_of, unknown_kinds
from agvm_ds.mmdet.plan import Plan

NOT_IN_BF16 = (DeformConv2d, ModulatedDeformConv2d, MultiScaleDeformableAttention, SyncBatchNorm)
RUNNERS = {"EpochBasedRunner": "max_epochs", "IterBasedRunner": "max_iters"}
"""Type -> the key that says how long it runs."""
PHASES = ("train", "val")
WITHOUT_EPOCHS = "an IterBasedRunner has no epochs, after which mmcv uses the averages: trained weights are published"


def refuse_unsupported(cfg: Config, plan: Plan) -> None:
    """Raise ConfigError with all of them together."""
    problems = [*_runner(cfg), *_resume(cfg), *_averages(cfg, plan), *unknown_kinds(cfg.get("custom_hooks"))]
    problems += [*_checkpoints(cfg), *_bad_updates(cfg), *_writers(plan), *rebuilding(cfg)]
    if problems:
        raise ConfigError("\n  ".join(["the config asks for what cannot be done here:", *problems]))
    if cfg.get("auto_resume"):
        plan.notes.append("the config's auto_resume is set aside: --resume continues a run")


def _runner(cfg: Config) -> Iterator[str]:
    if cfg.runner.get("type") not in RUNNERS:
        yield f"runner.type = {cfg.runner.get('type')!r}: allowed: {', '.join(RUNNERS)}"
    elif cfg.runner.get(RUNNERS[cfg.runner.type]) is None:
        yield f"runner: {cfg.runner.type} needs {RUNNERS[cfg.runner.type]}"
    if "train" not in cfg.data:
        yield "data.train: is missing"
    phases = [phase[0] for phase in cfg.get("workflow", [])]
    if "train" not in phases or not set(phases) <= set(PHASES):
        yield f"workflow = {cfg.get('workflow')}: its phases must be 'train' and, if wanted, 'val'"


def _resume(cfg: Config) -> Iterator[str]:
    if cfg.get("resume_from"):
        yield (
            f"resume_from = {cfg.resume_from!r}: a .pth has no optimizer state here: --resume continues the run in the work "
            "dir, load_from (or --load-from) starts with weights"
        )


def _averages(cfg: Config, plan: Plan) -> Iterator[str]:
    offload = (plan.deepspeed.get("zero_optimization") or {}).get("offload_optimizer") or {}
    for hook in listed(cfg.get("custom_hooks")):
        if (kind := class_of(hook)) not in EMA_HOOKS:
            continue
        name = f"custom hook {kind.__name__}"
        if hook.get("resume_from"):
            yield f"{name}: resume_from: --resume brings the averages back"
        elif offload.get("device") == "nvme":
            yield f"{name}: offload_optimizer.device nvme leaves no fp32 weights in memory to average; use cpu"
        elif cfg.runner.get("type") == "IterBasedRunner":
            plan.notes.append(f"{name}: {WITHOUT_EPOCHS}")


def _checkpoints(cfg: Config) -> Iterator[str]:
    kind = (cfg.get("checkpoint_config") or {}).get("type", "CheckpointHook")
    if class_of({"type": kind}) is not CheckpointHook:
        yield f"checkpoint_config.type = {kind!r}: allowed: CheckpointHook, or left out"


def refuse_detector(detector: nn.Module, plan: Plan) -> None:
    """Raise ConfigError for a detector of which something else would be trained than its own code says, or nothing."""
    kind = type(detector)
    for step in ("train_step", "val_step"):
        if getattr(kind, step, None) is not getattr(BaseDetector, step):
            raise ConfigError(
                f"{kind.__name__} has a {step} of its own, which would not be called: DeepSpeed's engine calls forward, and "
                "what is trained is the sum of the losses that forward_train returns"
            )
    teacher = getattr(detector, "teacher_model", None)
    if plan.half and isinstance(teacher, nn.Module) and teacher not in detector.children():
        raise ConfigError(
            f"{kind.__name__} in half precision: its teacher is no submodule, stays in float32 and cannot take the images; "
            "train it in float32"
        )
    if plan.half and any(isinstance(module, EmbeddingRPNHead) for module in detector.modules()):
        raise ConfigError(
            f"{kind.__name__} in {plan.half}: its proposals are weights, and mmcv's RoIAlign wants boxes of float32: train "
            'it in float32, or with "torch_autocast": {"enabled": true, "dtype": "bfloat16"}'
        )
    if plan.computes == "bf16" and get_accelerator().device_name() != "cpu":
        for name, module in detector.named_modules():
            if isinstance(module, NOT_IN_BF16):
                raise ConfigError(
                    f"{name} ({type(module).__name__}) in bf16: mmcv's kernel for a GPU knows float32 and float16 alone: "
                    "train it in float32 or fp16"
                )


def _bad_updates(cfg: Config) -> Iterator[str]:
    value = cfg.get(KEY, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        yield (
            f"{KEY} = {value!r}: must be an integer: how many updates in a row whose loss or gradient is not finite are "
            "skipped; 0 stops at the first"
        )


def _writers(plan: Plan) -> Iterator[str]:
    """A checkpoint's digests are taken when DeepSpeed has come back from writing it."""
    if (plan.deepspeed.get("checkpoint") or {}).get("writer"):
        yield "DeepSpeed JSON: checkpoint.writer: writes checkpoints later, when their digests are taken already"
