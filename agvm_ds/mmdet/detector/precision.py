"""Half precision in mmdet: what goes into losses and NMS is cast to float32, what goes into layers to the layers' type.

mmdet marks those functions with ``force_fp32`` and ``auto_fp16``, which act where a module's ``fp16_enabled`` is set and
know float16 only; for bfloat16 they are taught the other type.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from mmcv.runner import fp16_utils
from torch import nn

_cast = fp16_utils.cast_tensor_type


def enable_half(detector: nn.Module, kind: str) -> None:
    """Let mmdet's marked functions cast; kind: "fp16" or "bf16". The weights themselves are DeepSpeed's to cast."""
    if kind == "bf16":
        fp16_utils.cast_tensor_type = _cast_bf16
        # torch's CUDA autocast would choose float16; weights and inputs have the right type already.
        fp16_utils.autocast = _no_autocast
    for module in detector.modules():
        if hasattr(module, "fp16_enabled"):
            module.fp16_enabled = True  # type: ignore[assignment]


def _cast_bf16(inputs: Any, src_type: torch.dtype, dst_type: torch.dtype) -> Any:
    bf16 = {torch.half: torch.bfloat16}
    return _cast(inputs, bf16.get(src_type, src_type), bf16.get(dst_type, dst_type))


def _no_autocast(enabled: bool = True) -> Any:
    return nullcontext()
