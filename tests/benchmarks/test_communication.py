"""What is counted is what is called; and what the README says: pairwise adds one call of two numbers a module, and one."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks.communication import SMALL, Call, Collectives, added_seconds, counted, counted_as_one_of
from benchmarks.links import Cluster, gbit, total
from benchmarks.workloads import parameters_of
from tests.launch import CONTEXT, run_ranks


class _Sent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        torch.distributed.all_reduce(gradient)
        return gradient


def _calls() -> list[Call]:
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    with Collectives() as collectives:
        _Sent.apply(x).sum().backward()
        torch.distributed.broadcast(torch.zeros(5), 0)
        parts = [torch.zeros(2) for _ in range(2)]
        torch.distributed.all_gather(parts, torch.zeros(2))
    return collectives.calls


def test_calls_are_seen_in_the_backward_too_with_their_bytes(tmp_path: Path) -> None:
    for calls in run_ranks(_calls, 2, tmp_path):
        assert calls == [Call("all-reduce", 24), Call("broadcast", 20), Call("all-gather", 16)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_the_estimators_add_does_not_depend_on_the_ranks(stage: int, tmp_path: Path) -> None:
    real = run_ranks(counted, 2, tmp_path, SMALL, stage, local_size=1)[0]
    with ProcessPoolExecutor(1, CONTEXT, max_tasks_per_child=1) as pool:
        assert pool.submit(counted_as_one_of, 2, SMALL, stage).result() == real
        many = pool.submit(counted_as_one_of, 512, SMALL, stage).result()
    work = parameters_of(SMALL)
    elements = sum(p.numel() for p in work.model().parameters())
    for found in (real, many):
        assert _more(found, "pairwise") == [Call("all-reduce", (2 * len(work.modules) + 1) * 8)]
        assert _more(found, "split") == [
            Call("all-reduce", 4 * elements),
            Call("all-reduce", (4 * len(work.modules) + 1) * 8),
        ]


def _more(found: dict[str, list[Call]], way: str) -> list[Call]:
    """The calls of a way without those of plain DeepSpeed with the same groups."""
    left = list(found[way])
    for call in found["a group a module"]:
        left.remove(call)
    return left


def test_a_collective_that_is_not_known_is_not_passed_over(tmp_path: Path) -> None:
    assert run_ranks(_barrier, 1, tmp_path) == ["barrier: a collective that is not counted; KINDS names those that are"]


def _barrier() -> str:
    with pytest.raises(NotImplementedError) as caught, Collectives():
        torch.distributed.barrier()
    return str(caught.value)


def test_the_groups_are_paid_for_in_every_update() -> None:
    seconds = {"plain": 1.0, "a group a module": 1.5, "pairwise": 1.7}
    assert added_seconds(seconds, "pairwise", 1) == pytest.approx(0.7)
    assert added_seconds(seconds, "pairwise", 10) == pytest.approx(0.52)


def test_links_are_the_hierarchical_ring() -> None:
    one = Cluster(nodes=1, link=gbit(200), gpus=8, switch=100e9, latency=0.0)
    assert one.seconds("all-reduce", 8_000_000) == pytest.approx(2 * 7 / 8 * 8e6 / 100e9)
    many = Cluster(nodes=64, link=gbit(200), gpus=1, latency=0.0)
    assert many.seconds("all-gather", 64_000_000) == pytest.approx(63 / 64 * 64e6 / 25e9)
    late = Cluster(nodes=64, link=gbit(400), latency=1e-4)
    assert late.seconds("broadcast", 0) == 1e-4
    assert total(late, [("broadcast", 3, 0)]) == pytest.approx(3e-4)
    assert total(late, [("all-reduce", 2, 10**9)]) == pytest.approx(late.seconds("all-reduce", 10**9) + 1e-4)
