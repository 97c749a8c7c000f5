"""What an update sends: calls and bytes of every collective, counted where torch dispatches it.

    python -m benchmarks.communication      2 minutes on two cores

Real ranks (gloo) train the demo detector's parameters; one rank of 8 to 1024 trains those of a ResNet-50 Faster R-CNN in
torch's fake process group, whose collectives do nothing: the code that runs is the real code of that rank, the values mean
nothing. Where both can be run they must agree. Bytes are those of the whole tensor that is reduced, gathered or sent; what
crosses a rank's link, by the usual ring, is in links.py. No accumulation, so one micro-batch a rank; the second update is
counted, which measures. SGD with momentum: pairwise needs nothing elementwise there.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.links import Cluster, gbit, total
from benchmarks.machine import save
from benchmarks.naive import NaiveSplit
from benchmarks.workloads import Workload, ds_config, engine_of, parameters_of, update
from tests.launch import CONTEXT, run_ranks

SMALL, LARGE = None, "faster_rcnn_r50_fpn_1x_coco"
REAL, FAKE = (2, 4, 8), (8, 64, 512, 1024)
NODE = 8
"""Ranks of a node. Where all ranks are of one, DeepSpeed takes shared memory on a CPU, which torch does not see."""
PLANNED_STAGE, PLANNED_RANKS = 2, 512
PLAIN, GROUPS = "plain", "a group a module"
WAYS = (PLAIN, GROUPS, "pairwise", "split", "naive")


@dataclass(frozen=True)
class Call:
    """One collective that was called."""

    kind: str
    bytes: int


class Collectives(TorchDispatchMode):
    """Notes every collective that is called within, the backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            if func._opname not in KINDS:
                raise NotImplementedError(
                    f"{func._opname}: a collective that is not counted; KINDS names those that are"
                )
            kind, argument = KINDS[func._opname]
            self.calls.append(Call(kind, _bytes(args[argument])))
        return func(*args, **(kwargs or {}))


KINDS = {
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "gather_": ("gather", 1),
    "allgather_": ("all-gather", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "reduce_scatter_": ("reduce-scatter", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
}
"""torch's name of a collective -> ours, and which of its arguments is the whole: what goes in, or what comes out."""


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(tensor) for tensor in tensors)


def counted(model: str | None, stage: int) -> dict[str, list[Call]]:
    """In a rank: the calls of one measured update, by way."""
    work = parameters_of(model)
    return {way: _counted(work, stage, way) for way in WAYS}


def _counted(work: Workload, stage: int, way: str) -> list[Call]:
    agvm = {"estimator": way, "interval": 1} if way in ("pairwise", "split") else None
    with ExitStack() as stack:
        engine = stack.enter_context(engine_of(work, ds_config(work, stage, "SGD", agvm), cut=way != PLAIN))
        if way == "naive":
            NaiveSplit(engine, work.modules, 1)
        update(engine, work, 0)
        collectives = stack.enter_context(Collectives())
        update(engine, work, 1)
        return collectives.calls


def counted_as_one_of(ranks: int, model: str | None, stage: int) -> dict[str, list[Call]]:
    """In a process of its own: the same of rank 0 of many, in a process group that sends nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(NODE if ranks > NODE else 1),
    }
    torch.distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    return counted(model, stage)


def rows_of(
    ranks: int, model: str | None, stage: int, real: bool, calls: Mapping[str, Sequence[Call]]
) -> list[dict[str, Any]]:
    """A row a way and kind of collective."""
    rows = []
    for way, found in calls.items():
        for kind in sorted({call.kind for call in found}):
            some = [call.bytes for call in found if call.kind == kind]
            rows.append(
                {"model": model or "demo", "stage": stage, "ranks": ranks, "real": real, "way": way}
                | {"kind": kind, "calls": len(some), "bytes": sum(some)}
            )
    return rows


def measure() -> list[dict[str, Any]]:
    """All rows: the demo in real ranks, checked against the fake group, and the large model in the fake one."""
    rows = []
    stages = range(4)
    with tempfile.TemporaryDirectory() as place, ProcessPoolExecutor(1, CONTEXT, max_tasks_per_child=1) as fake:
        for ranks in REAL:
            for stage in stages:
                real = run_ranks(counted, ranks, Path(place), SMALL, stage, local_size=1)[0]
                alone = fake.submit(counted_as_one_of, ranks, SMALL, stage).result()
                if real != alone:
                    raise RuntimeError(
                        f"{ranks} ranks, stage {stage}: the fake process group is called otherwise than gloo"
                    )
                rows += rows_of(ranks, SMALL, stage, True, real)
        for ranks in FAKE:
            for stage in stages:
                rows += rows_of(
                    ranks, LARGE, stage, False, fake.submit(counted_as_one_of, ranks, LARGE, stage).result()
                )
    return rows


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: what each way calls, in real ranks and in many; then the plan for 512 GPUs."""
    return "\n".join([*_calls(rows, "demo"), *_calls(rows, LARGE), *_plan(rows)])


def _calls(rows: Sequence[Mapping[str, Any]], model: str) -> Iterator[str]:
    some = [row for row in rows if row["model"] == model]
    yield f"**{model}: calls, and MB of whole tensors, in one measured update**\n"
    yield "| stage | ranks | plain | groups add | pairwise adds to that | split adds | naive adds |"
    yield "|---|---|---|---|---|---|---|"
    for stage, ranks in dict.fromkeys((row["stage"], row["ranks"]) for row in some):
        found = {way: _totals(some, stage, ranks, way) for way in WAYS}
        count, size = found[PLAIN]
        cells = [f"{count} call{'s' * (count != 1)}, {_megabytes(size)}"]
        for way in WAYS[1:]:
            more, bytes_more = found[way][0] - count, found[way][1] - size
            count, size = found[GROUPS]
            cells.append(f"{more} call{'s' * (more != 1)}, {_megabytes(bytes_more)}")
        yield f"| {stage} | {ranks} | {' | '.join(cells)} |"
    yield ""


def _totals(rows: Sequence[Mapping[str, Any]], stage: int, ranks: int, way: str) -> tuple[int, int]:
    found = [row for row in rows if (row["stage"], row["ranks"], row["way"]) == (stage, ranks, way)]
    return sum(row["calls"] for row in found), sum(row["bytes"] for row in found)


def _megabytes(size: int) -> str:
    units = ((10**6, "MB"), (10**3, "kB"))
    return next((f"{size / unit:.1f} {name}" for unit, name in units if size >= unit), f"{size} B")


def _plan(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Seconds of communication at 512 ranks, and shares of an update."""
    some = [row for row in rows if (row["model"], row["stage"], row["ranks"]) == (LARGE, PLANNED_STAGE, PLANNED_RANKS)]
    elements = sum(p.numel() for p in parameters_of(LARGE).model().parameters())
    size = f"{PLANNED_RANKS} GPUs in nodes of {NODE}, ZeRO stage {PLANNED_STAGE}"
    yield f"**A plan, not a measurement: {size}, nothing overlapped**\n"
    yield "| detector | link of a node | plain sends | update | pairwise @1 | @10 | split @1 | @10 | naive @1 | @10 |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for name, parameters, computing in (
        (f"Faster R-CNN R50, {elements / 1e6:.0f} M", elements, 1.0),
        ("1 B parameters", 10**9, 4.0),
    ):
        for rate in (200, 400):
            cluster = Cluster(PLANNED_RANKS // NODE, gbit(rate))
            seconds = {way: total(cluster, _scaled(some, way, parameters / elements)) for way in WAYS}
            update = computing + seconds[PLAIN]
            added = [added_seconds(seconds, way, interval) for way in WAYS[2:] for interval in (1, 10)]
            cells = [f"+{100 * more / update:.2g} %" for more in added]
            yield f"| {name} | {rate} Gb/s | {1000 * seconds[PLAIN]:.0f} ms | {update:.2f} s | {' | '.join(cells)} |"
    yield ""


def added_seconds(seconds: Mapping[str, float], way: str, interval: int) -> float:
    """What a way adds to an update in the mean: its groups to each, its measure to one of ``interval``."""
    return seconds[GROUPS] - seconds[PLAIN] + (seconds[way] - seconds[GROUPS]) / interval


def _scaled(rows: Sequence[Mapping[str, Any]], way: str, factor: float) -> Iterator[tuple[str, int, int]]:
    """The calls of a way for a model that is ``factor`` times as large, cut into modules and parameters alike."""
    for row in rows:
        if row["way"] == way:
            yield row["kind"], row["calls"], int(row["bytes"] * factor)


def main(arguments: Sequence[str] | None = None) -> str:
    """Count, save, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.communication", description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="communication.json is written there")
    args = parser.parse_args(arguments)
    rows = measure()
    save(args.save, "communication", rows)
    text = tables(rows)
    print(text)
    return text


if __name__ == "__main__":
    main()
