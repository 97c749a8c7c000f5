"""A resumed epoch reads the data that it read before, also where their order is drawn when the epoch begins."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from agvm_ds.mmdet.randomness import random_state, set_random_state
from agvm_ds.mmdet.runner import EngineRunner, EpochBasedEngineRunner


class Shuffled:
    """Ten items in an order from NumPy's generator, as mmdet's GroupSampler takes it."""

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.permutation(10).tolist())


def updates(skip: int, epoch_start: Any) -> list[tuple[int, int]]:
    runner: Any = SimpleNamespace(_skip=skip, _epoch_start=epoch_start)
    return list(EpochBasedEngineRunner._updates(runner, Shuffled()))


def test_the_rest_of_an_epoch_is_in_the_order_drawn_at_its_start() -> None:
    start = random_state()
    whole = updates(0, None)
    now = random_state()
    assert updates(4, start) == whole[4:]
    assert random_state()["numpy"] == now["numpy"], "passing by leaves no trace"
    set_random_state(start)
    assert updates(0, None) == whole


def test_an_epoch_whose_updates_are_all_done_reads_nothing() -> None:
    before = random_state()
    assert updates(10, None) == []
    assert random_state()["numpy"] == before["numpy"]


class Validated:
    """mmcv's half of a runner: what a phase "val" finds in the published detector."""

    def val(self: Any, data_loader: Any) -> None:
        self.found.append(self.model.published.weight.item())


class Runner(EngineRunner, Validated):  # type: ignore[misc]
    """Without an engine; its weight is the count of gatherings."""

    def __init__(self) -> None:
        self.model, self._iter, self.found, self.gathered = SimpleNamespace(published=nn.Linear(1, 1, False)), 0, [], 0

    def weights(self) -> Any:
        self.gathered += 1
        return {"weight": torch.full((1, 1), float(self.gathered))}


def test_weights_are_gathered_once_for_a_val_phase() -> None:
    """An iteration-based run comes by once a validation batch."""
    runner = Runner()
    for runner._iter in (0, 0, 3, 3):
        runner.val(None)
    assert runner.found == [1.0, 1.0, 2.0, 2.0]
