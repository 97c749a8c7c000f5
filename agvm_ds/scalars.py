"""Parameters without dimensions: mmcv's Scale, which many of mmdet's dense heads have (FCOS, ATSS, GFL, ...).

DeepSpeed 0.19 sends the first weights from rank 0 as bytes, and torch has no such view of a tensor without dimensions:
``deepspeed.initialize`` fails. Here they have one dimension while they are sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import Init


@contextmanager
def scalars_sent() -> Iterator[None]:
    """Within it DeepSpeed can send them, in every ZeRO stage."""
    with ExitStack() as stack:
        stack.enter_context(_replaced(DeepSpeedEngine, "_broadcast_model", _sending_model))
        stack.enter_context(_replaced(Init, "_convert_to_deepspeed_param", _about_to_be_sent))
        yield


def _sending_model(send: Callable[..., None]) -> Callable[..., None]:
    """Stages 0 to 2, and 3 before it cuts the parameters."""

    def sent(engine: DeepSpeedEngine) -> None:
        scalars = [parameter for parameter in engine.module.parameters() if parameter.dim() == 0]
        for parameter in scalars:
            parameter.data = parameter.data.view(1)
        send(engine)
        for parameter in scalars:
            parameter.data = parameter.data.view(())

    return sent


def _about_to_be_sent(convert: Callable[..., None]) -> Callable[..., None]:
    """Stage 3: once its shape is noted, a parameter is sent and cut; it is put together with the shape that was noted."""

    def converted(init: Init, parameter: torch.Tensor) -> None:
        convert(init, parameter)
        if parameter.dim() == 0:
            parameter.data = parameter.data.view(1)

    return converted


@contextmanager
def _replaced(owner: type, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, wraps(before)(change(before)))
    try:
        yield
    finally:
        setattr(owner, name, before)
