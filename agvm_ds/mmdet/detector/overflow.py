"""No ZeRO stage steps with a gradient that is not finite: where DeepSpeed 0.19 would, it is made to look.

What DeepSpeed does by itself, and what is done here:

    stage 0, fp32                       steps, weights become nan      looked at before the step, skipped in DeepSpeed's way
    stages 1 and 2                      skips, unless it was told not to look (compute_grad_norm,
                                        bf16.check_grad_overflow)      told to look: one pass over this rank's shard
    stage 0 in bf16, stage 3, bf16 with fp32 accumulation in stage 1   skips: nothing is done
    a loss scale (fp16)                 skips, and lowers the scale: its normal course, nothing is done
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm


def loss_scaled(engine: Any) -> bool:
    """Whether gradients that overflow are the normal course: a loss scale is then lowered, and the update skipped."""
    dynamic = bool(engine.fp16_enabled() and engine.dynamic_loss_scale())
    return dynamic or engine.torch_autocast_z0_gradscaler is not None


def skip_in_every_stage(engine: Any) -> None:
    """From now on ``engine.was_step_applied()`` is False, and nothing changed, after a gradient that is not finite."""
    optimizer = engine.optimizer
    if engine.torch_autocast_z0_gradscaler is not None:
        return
    if not hasattr(optimizer, "overflow"):
        _skip_unwrapped(engine)
    elif hasattr(optimizer, "check_grad_overflow") and not _looks(optimizer):
        optimizer.check_grad_overflow = True


def _looks(zero: Any) -> bool:
    """Whether stages 1 and 2 see a bad gradient by the norm, which they compute for clipping."""
    return bool(zero.compute_grad_norm and zero.dtype != torch.bfloat16) or bool(zero.check_grad_overflow)


def _skip_unwrapped(engine: Any) -> None:
    """Stage 0 in fp32 steps the client optimizer itself: that one is given the ``overflow`` which the engine asks others for.

    The gradients are the same on every rank, and so is what is found. They are looked at before they are clipped: a norm that
    is not finite would make zeros of them.
    """
    optimizer, step, take_step = engine.optimizer, engine.optimizer.step, engine._take_model_step
    optimizer.overflow = False

    @wraps(step)
    def step_if_finite(*args: Any, **kwargs: Any) -> Any:
        return None if optimizer.overflow else step(*args, **kwargs)

    @wraps(take_step)
    def take_model_step(*args: Any, **kwargs: Any) -> None:
        optimizer.overflow = not _norm_is_finite(engine.module)
        take_step(*args, **kwargs)

    optimizer.step, engine._take_model_step = step_if_finite, take_model_step


def _norm_is_finite(module: nn.Module) -> bool:
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return bool(torch.isfinite(get_total_norm(gradients)))
