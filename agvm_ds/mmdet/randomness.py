"""The random state of a rank, as plain data that a checkpoint can hold."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator


def random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's, torch's and the accelerator's generators."""
    accelerator = get_accelerator()
    on_device = None if accelerator.device_name() == "cpu" else accelerator.get_rng_state()
    numbers = np.random.get_state(legacy=False)
    numbers["state"]["key"] = numbers["state"]["key"].tolist()  # a checkpoint is read without numpy's classes
    return {
        "python": random.getstate(),
        "numpy": numbers,
        "torch": torch.get_rng_state(),
        "device": on_device,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put a state back."""
    random.setstate(state["python"])
    numbers = state["numpy"]
    np.random.set_state({**numbers, "state": {**numbers["state"], "key": np.array(numbers["state"]["key"], np.uint32)}})
    torch.set_rng_state(state["torch"])
    if state["device"] is not None:
        get_accelerator().set_rng_state(state["device"])


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """What happens within leaves no trace in the random state: an evaluation does not change the training after it."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
