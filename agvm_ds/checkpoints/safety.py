"""A checkpoint is data: reading it runs no code that somebody may have put into it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address


def enum_member(kind: Any, name: Any) -> Enum:
    """``getattr`` for members of enums alone. Raises pickle.UnpicklingError for anything else."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"getattr({kind!r}, {name!r}) is not a member of an enum")
    return kind[name]


DEEPSPEED_CLASSES: list[Any] = [
    *(LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address),
    (enum_member, "builtins.getattr"),  # by which Python 3.11.2 pickles a member of an enum
]
"""All that DeepSpeed 0.19 puts into its checkpoints beside tensors and Python's plain types."""

_ONLY, _ANYTHING = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def weights_only() -> Iterator[None]:
    """Every ``torch.load`` within reads tensors and plain data, though its caller asks for any pickle, as DeepSpeed does.

    A file that holds more raises ``pickle.UnpicklingError``, which names the class.
    """
    with _environment(_ONLY, _ANYTHING), torch.serialization.safe_globals(DEEPSPEED_CLASSES):
        yield


@contextmanager
def any_pickle() -> Iterator[None]:
    """``torch.load`` within reads whatever a file holds, which may be code: for files that the user has said to trust."""
    with _environment(_ANYTHING, _ONLY):
        yield


@contextmanager
def _environment(on: str, off: str) -> Iterator[None]:
    before = {name: os.environ.pop(name, None) for name in (on, off)}
    os.environ[on] = "1"
    try:
        yield
    finally:
        del os.environ[on]
        os.environ.update({name: value for name, value in before.items() if value is not None})
