"""A checkpoint is data: reading it runs no code that somebody may have put into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

DEEPSPEED_CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
"""All that DeepSpeed 0.19 puts into its checkpoints beside tensors and Python's plain types."""

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def weights_only() -> Iterator[None]:
    """Every ``torch.load`` within reads tensors and plain data, though its caller asks for any pickle, as DeepSpeed does.

    A file that holds more raises ``pickle.UnpicklingError``, which names the class.
    """
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(DEEPSPEED_CLASSES):
            yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before
