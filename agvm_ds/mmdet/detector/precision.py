"""Half precision in mmdet: what goes into losses and NMS is cast to float32, what goes into layers to the layers' type.

mmdet marks those functions with ``force_fp32`` and ``auto_fp16``, which act where a module's ``fp16_enabled`` is set and
know float16 on a GPU only; they are taught the other type, and the CPU.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from mmcv.ops import SyncBatchNorm
from mmcv.runner import fp16_utils
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_cast = fp16_utils.cast_tensor_type

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def enable_half(detector: nn.Module, kind: str) -> None:
    """Let mmdet's marked functions cast; kind: of TYPES. The weights themselves are DeepSpeed's to cast, if it does."""
    fp16_utils.autocast = partial(torch.autocast, get_accelerator().device_name(), dtype=TYPES[kind])
    fp16_utils.cast_tensor_type = _cast_bf16 if kind == "bf16" else _cast
    for module in detector.modules():
        if hasattr(module, "fp16_enabled"):
            module.fp16_enabled = True  # type: ignore[assignment]
        if type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward):
            module.forward = MethodType(_normalize, module)  # type: ignore[method-assign]


def _cast_bf16(inputs: Any, src_type: torch.dtype, dst_type: torch.dtype) -> Any:
    bf16 = {torch.half: torch.bfloat16}
    return _cast(inputs, bf16.get(src_type, src_type), bf16.get(dst_type, dst_type))


def _normalize(norm: nn.Module, images: torch.Tensor) -> Any:
    return type(norm).forward(_AsItsStatistics(norm), images)  # type: ignore[arg-type]


class _AsItsStatistics:
    """A BatchNorm with its weight and bias in the type of its statistics: torch wants all four alike.

    DeepSpeed leaves those in float32, unless ``data_types.buffer_dtype`` says otherwise.
    """

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.norm, name)
        if name not in ("weight", "bias") or value is None:
            return value
        return value.to(torch.float32 if self.norm.running_mean is None else self.norm.running_mean.dtype)
