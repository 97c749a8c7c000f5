"""The owner-reduction's buckets, without ranks: a stand-in for the shards records what is reduced."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from agvm_ds.shards import Fragment, OwnerReduction, Piece

SIZES = [3, 5, 2, 7]


class OneRank:
    """All elements are this rank's, in one buffer, in the model's order."""

    def __init__(self) -> None:
        parameters = [nn.Parameter(torch.zeros(size)) for size in SIZES]
        module = nn.ParameterList(parameters)
        self.engine = SimpleNamespace(device="cpu", module=module)
        self.optimizer = SimpleNamespace(owned=[SimpleNamespace(parameter=p) for p in parameters])
        self.reduced: list[list[float]] = []

    def fragments(self) -> list[Fragment | None]:
        starts = [sum(SIZES[:i]) for i in range(len(SIZES))]
        return [Fragment(0, start, 0, size) for start, size in zip(starts, SIZES, strict=True)]

    def zeros(self) -> list[torch.Tensor]:
        return [torch.zeros(sum(SIZES))]

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        self.reduced.append(values.tolist())
        return values


def contribute(reduction: OwnerReduction, order: list[int], value: float = 1.0) -> None:
    for index in order:
        reduction.slot(index).add_(value * (index + 1))
        reduction.arrived(index)


def sums(reduction: OwnerReduction) -> list[float]:
    return reduction.of(Piece(0, "all", 0, 0, torch.zeros(sum(SIZES)))).tolist()


@pytest.fixture
def shards() -> Any:
    return OneRank()


WHOLE = [1.0] * 3 + [2.0] * 5 + [3.0] * 2 + [4.0] * 7


def test_one_bucket_is_reduced_once_an_update(shards: Any) -> None:
    reduction = OwnerReduction(shards, 100)
    reduction.start()
    for _ in range(3):
        contribute(reduction, [3, 2, 1, 0])
        reduction.end_micro_batch()
        assert not shards.reduced
    for _ in range(2):  # to ask again is no new reduction
        reduction.finish()
        assert len(shards.reduced) == 1
    assert sums(reduction) == [3 * value for value in WHOLE]


@pytest.mark.parametrize("order", [[3, 2, 1, 0], [0, 1, 2, 3], [2, 0, 3, 1]], ids=str)
def test_the_order_of_buckets_is_fixed_whatever_the_order_of_gradients(shards: Any, order: list[int]) -> None:
    """From the last parameter to the first, full ones at once: 7 | 2 + 5 | 3 elements."""
    reduction = OwnerReduction(shards, 7)
    reduction.start()
    for _ in range(2):
        contribute(reduction, order)
        reduction.end_micro_batch()
    reduction.finish()
    assert shards.reduced == 2 * [[4.0] * 7, [3.0] * 2 + [2.0] * 5, [1.0] * 3]
    assert sums(reduction) == [2 * value for value in WHOLE]


def test_a_bucket_is_reduced_as_soon_as_it_is_full_and_its_turn(shards: Any) -> None:
    reduction = OwnerReduction(shards, 7)
    reduction.start()
    contribute(reduction, [3])
    assert len(shards.reduced) == 1
    contribute(reduction, [0, 2])
    assert len(shards.reduced) == 1, "the last bucket waits for the one before, which waits for parameter 1"
    contribute(reduction, [1])
    assert len(shards.reduced) == 3


def test_a_parameter_without_gradient_gives_zeros_and_every_bucket_is_reduced(shards: Any) -> None:
    """What another rank gives in its place must meet a reduction here."""
    reduction = OwnerReduction(shards, 7)
    reduction.start()
    contribute(reduction, [2])
    reduction.end_micro_batch()
    assert shards.reduced == [[0.0] * 7, [3.0] * 2 + [0.0] * 5, [0.0] * 3]
    assert sums(reduction) == [0.0] * 8 + [3.0] * 2 + [0.0] * 7


def test_a_parameter_larger_than_a_bucket_is_one_by_itself(shards: Any) -> None:
    reduction = OwnerReduction(shards, 1)
    reduction.start()
    contribute(reduction, [3, 2, 1, 0])
    reduction.end_micro_batch()
    assert [len(values) for values in shards.reduced] == [7, 2, 5, 3]


def test_start_forgets_an_update_that_was_left(shards: Any) -> None:
    for size in (7, 100):
        reduction = OwnerReduction(shards, size)
        reduction.start()
        contribute(reduction, [3, 0], 10.0)
        reduction.start()
        contribute(reduction, [3, 2, 1, 0])
        reduction.end_micro_batch()
        reduction.finish()
        assert sums(reduction) == WHOLE
