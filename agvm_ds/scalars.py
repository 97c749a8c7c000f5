"""Parameters without dimensions: mmcv's Scale, which many of mmdet's dense heads have (FCOS, ATSS, GFL, ...).

DeepSpeed 0.19 sends the first weights from rank 0 as bytes, and torch has no such view of a tensor without dimensions:
``deepspeed.initialize`` fails, and so does loading in stage 3. In stage 0 it clips by a tensor of one dimension: the first
step fails. Here they have one dimension while they are sent, and their gradients while they are clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import GatheredParameters, Init


@contextmanager
def scalars_sent() -> Iterator[None]:
    """Within it DeepSpeed can send them, in every ZeRO stage."""
    with ExitStack() as stack:
        stack.enter_context(_replaced(DeepSpeedEngine, "_broadcast_model", _sending_model))
        stack.enter_context(_replaced(Init, "_convert_to_deepspeed_param", _about_to_be_sent))
        stack.enter_context(_replaced(GatheredParameters, "__exit__", _changed))
        yield


def _sending_model(send: Callable[..., None]) -> Callable[..., None]:
    """Stages 0 to 2, and 3 before it cuts the parameters."""

    def sent(engine: DeepSpeedEngine) -> None:
        with _one_dimension(parameter for parameter in engine.module.parameters() if parameter.dim() == 0):
            send(engine)

    return sent


def mend_scalars(engine: Any) -> None:
    """Let an engine that has some clip their gradients without ZeRO, and load them in stage 3."""
    scalars = [parameter for parameter in engine.module.parameters() if _is_scalar(parameter)]
    if scalars:
        engine.clip_fp32_gradients = _clipping(engine.clip_fp32_gradients, scalars)
        engine.load_module_state_dict = scalars_sent()(engine.load_module_state_dict)


def _is_scalar(parameter: torch.Tensor) -> bool:
    """Also one that stage 3 has cut."""
    return getattr(parameter, "ds_shape", parameter.shape) == ()


def _clipping(clip: Callable[[], None], scalars: list[torch.Tensor]) -> Callable[[], None]:
    @wraps(clip)
    def clipped() -> None:
        with _one_dimension(parameter.grad for parameter in scalars if parameter.grad is not None):
            clip()

    return clipped


def _about_to_be_sent(convert: Callable[..., None]) -> Callable[..., None]:
    """Stage 3: once its shape is noted, a parameter is sent and cut; it is put together with the shape that was noted."""

    def converted(init: Init, parameter: torch.Tensor) -> None:
        convert(init, parameter)
        if parameter.dim() == 0:
            parameter.data = parameter.data.view(1)

    return converted


def _changed(leave: Callable[..., None]) -> Callable[..., None]:
    """Stage 3: rank 0 has loaded whole parameters, which are sent and cut again."""

    def left(gathered: GatheredParameters, *error: Any) -> None:
        for parameter in getattr(gathered, "params", []):
            if gathered.src_rank is not None and parameter.dim() == 0:
                parameter.data = parameter.data.view(1)
        leave(gathered, *error)

    return left


@contextmanager
def _one_dimension(scalars: Iterable[torch.Tensor]) -> Iterator[None]:
    """These tensors have one, for a while."""
    changed = list(scalars)
    for tensor in changed:
        tensor.data = tensor.data.view(1)
    try:
        yield
    finally:
        for tensor in changed:
            tensor.data = tensor.data.view(())


@contextmanager
def _replaced(owner: type, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, wraps(before)(change(before)))
    try:
        yield
    finally:
        setattr(owner, name, before)
