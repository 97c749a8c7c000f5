"""What AGVM adds to the time of an update, as ratios to plain DeepSpeed.

    python -m benchmarks.updates                    an hour on two cores
    python -m benchmarks.updates --rounds 10        a rough look
    python -m benchmarks.updates --only parameters  one of the workloads
    DS_ACCELERATOR=cuda python -m benchmarks.updates    on one GPU: Faster R-CNN R50 on images of 800 x 1344 pixels

Everything that is compared trains side by side in the same ranks: one engine a way, one update of each in turn, the order
turning with every round, a barrier before and after each. A ratio is that of two updates of the same round; printed are the
median over the rounds and its 95 % interval (bootstrap). ``plain`` appears twice: what the second differs from the first is
what this machine cannot tell apart. With interval 10, measured and unmeasured updates are taken apart and put together as
1 : 9. Ways: see ``WAYS``; ``naive`` is in naive.py.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator

from benchmarks.machine import save
from benchmarks.naive import NaiveSplit
from benchmarks.workloads import Workload, demo, ds_config, engine_of, parameters_of, random_images, update
from tests.launch import ON_GPU, run_ranks

INTERVAL = 10
WARM_UP = 3
"""Rounds that are not counted."""
LEAST = 8
"""Rounds; the large workload, whose updates take long and vary less, has a quarter of the others'."""
NEVER = 10**9
LARGE = "faster_rcnn_r50_fpn_1x_coco"


@dataclass(frozen=True)
class Way:
    """One thing that is compared: an ``agvm`` block (None: plain DeepSpeed), or the naive way beside plain DeepSpeed."""

    name: str
    agvm: Mapping[str, Any] | None = None
    interval: int = 1
    naive: bool = False
    cut: bool = False
    """Into AGVM's parameter groups, one a module."""


def _measuring(estimator: str, precondition: str, interval: int) -> Way:
    name = f"{estimator}{', preconditioned' if precondition == 'auto' else ''}"
    return Way(name, {"estimator": estimator, "precondition": precondition, "interval": interval}, interval)


PLAIN = [Way("plain"), Way("plain, again")]
WAYS = [
    *PLAIN,
    Way("plain, a group a module", cut=True),
    Way("AGVM on, not measured", {"start_step": NEVER}),
    *(_measuring(e, p, i) for e in ("pairwise", "split") for p in ("none", "auto") for i in (1, INTERVAL)),
    Way("naive", None, 1, True),
    Way("naive", None, INTERVAL, True),
]
FEW = [*PLAIN, *(way for way in WAYS if way.interval == 1 and way.agvm and "preconditioned" not in way.name), WAYS[-2]]
"""Where memory or time does not suffice for all."""


@dataclass(frozen=True)
class Case:
    """One run of ranks: a workload in one ZeRO stage."""

    workload: str
    stage: int
    ranks: int
    ways: Sequence[Way]


def _parts(ways: Sequence[Way], size: int = 4) -> Iterator[Sequence[Way]]:
    """A few ways at a time, each time beside plain: engines of a large model fill the memory."""
    for start in range(0, len(ways) - 1, size):
        yield [ways[0], *ways[1:][start : start + size]]


ON_CPU = [
    *(Case("demo", stage, 2, WAYS) for stage in range(4)),
    *(Case("demo", stage, 4, FEW) for stage in range(4)),
    *(Case("parameters", stage, 2, ways) for stage in range(4) for ways in _parts(WAYS)),
    *(Case("parameters", stage, 4, FEW) for stage in range(4)),
]
ONE_RANK = [way for way in WAYS if way.interval == 1 and not way.naive]
"""Every way once, measured in every update; not naive, for one rank has no halves of ranks to send around."""
CASES = (
    [
        *(Case("images", stage, 1, ONE_RANK) for stage in range(4)),
        *(Case("images fp16", stage, 1, ONE_RANK) for stage in range(1, 4)),
    ]
    if ON_GPU
    else ON_CPU
)
WORKLOADS: Mapping[str, Callable[[], Workload]] = {
    "demo": demo,
    "parameters": partial(parameters_of, LARGE),
    "images": partial(random_images, LARGE),
    "images fp16": partial(random_images, LARGE, "fp16"),
}


def timed(case: Case, rounds: int) -> list[list[float]]:
    """In a rank: seconds of each update, by way and round."""
    work = WORKLOADS[case.workload]()
    with ExitStack() as stack:
        engines = [stack.enter_context(engine_of(work, _config(case, way, work), way.cut)) for way in case.ways]
        for engine, way in zip(engines, case.ways, strict=True):
            if way.naive:
                NaiveSplit(engine, work.modules, way.interval)
        seconds: list[list[float]] = [[] for _ in engines]
        for t in range(WARM_UP + rounds):
            for turn in range(len(engines)):
                which = (turn + t) % len(engines)
                taken = _seconds(engines[which], work, t)
                if t >= WARM_UP:
                    seconds[which].append(taken)
    return seconds


def _config(case: Case, way: Way, work: Workload) -> dict[str, Any]:
    more: dict[str, Any] = {"gradient_accumulation_steps": 2} if case.ranks == 1 else {}
    more |= {work.half: {"enabled": True, "loss_scale": 128.0}} if work.half else {}
    return ds_config(work, case.stage, "AdamW", way.agvm, **more)


def _seconds(engine: Any, work: Workload, t: int) -> float:
    device = get_accelerator()
    comm.barrier()
    device.synchronize()
    begin = time.perf_counter()
    update(engine, work, t)
    comm.barrier()
    device.synchronize()
    return time.perf_counter() - begin


@dataclass(frozen=True)
class Ratio:
    """The median of ratios, and where 95 % of the medians of as many draws lie."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


def ratio(way: Way, mine: Sequence[float], plain: Sequence[float]) -> Ratio:
    """How long an update of this way takes, plain DeepSpeed's being 1."""
    ratios = np.array(mine) / np.array(plain)
    measured = (np.arange(len(ratios)) + WARM_UP) % way.interval == 0
    random = np.random.default_rng(0)

    def centre(draw: np.ndarray) -> float:
        parts = [(measured, 1), (~measured, way.interval - 1)]
        return sum(float(np.median(draw[part])) * weight for part, weight in parts if weight) / way.interval

    draws = []
    for _ in range(1000):
        picked = [random.choice(np.flatnonzero(part), part.sum()) for part in (measured, ~measured)]
        draw = ratios.copy()
        draw[measured], draw[~measured] = ratios[picked[0]], ratios[picked[1]] if len(picked[1]) else ()
        draws.append(centre(draw))
    low, high = np.percentile(draws, [2.5, 97.5])
    return Ratio(centre(ratios), float(low), float(high))


def rows_of(case: Case, seconds: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """A row a way."""
    plain = seconds[0]
    return [
        {
            "workload": case.workload,
            "stage": case.stage,
            "ranks": case.ranks,
            "way": way.name,
            "interval": way.interval,
            "plain_seconds": float(np.median(plain)),
            **asdict(ratio(way, mine, plain)),
        }
        for way, mine in zip(case.ways, seconds, strict=True)
    ]


def measure(cases: Sequence[Case], rounds: int, folder: Path | None) -> list[dict[str, Any]]:
    """All rows, saved case after case."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        for case in cases:
            some = max(rounds // 4, LEAST) if case.workload == "parameters" else rounds
            by_rank = run_ranks(timed, case.ranks, Path(place), case, some, timeout=3600)
            rows += rows_of(case, by_rank[0])
            save(folder, "updates", rows)
    return rows


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one table a workload and number of ranks, a line a way, a column a stage."""
    lines = []
    for workload, ranks in dict.fromkeys((row["workload"], row["ranks"]) for row in rows):
        some = [row for row in rows if (row["workload"], row["ranks"]) == (workload, ranks)]
        stages = sorted({row["stage"] for row in some})
        lines += [f"**{workload}, {ranks} rank{'s' * (ranks > 1)}**", ""]
        lines += [f"| way | interval | {' | '.join(f'stage {stage}' for stage in stages)} |"]
        lines += ["|---" * (2 + len(stages)) + "|"]
        for way, interval in dict.fromkeys((row["way"], row["interval"]) for row in some if row["way"] != "plain"):
            found = [row for row in some if (row["way"], row["interval"]) == (way, interval)]
            cells = [str(Ratio(row["median"], row["low"], row["high"])) for row in found]
            lines.append(f"| {way} | {interval if way not in _NO_INTERVAL else ''} | {' | '.join(cells)} |")
        plain = [f"{1000 * _plain(some, stage):.0f} ms" for stage in stages]
        lines += [f"| plain, an update | | {' | '.join(plain)} |", ""]
    return "\n".join(lines)


def _plain(rows: Sequence[Mapping[str, Any]], stage: int) -> float:
    """Seconds of plain DeepSpeed's update, median over the runs of ranks."""
    return float(np.median([row["plain_seconds"] for row in rows if row["stage"] == stage and row["way"] == "plain"]))


_NO_INTERVAL = ("plain, again", "plain, a group a module", "AGVM on, not measured")


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, save, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.updates", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds",
        type=int,
        default=40,
        help="updates of each way on the demo (default %(default)s); a quarter on the large workload",
    )
    parser.add_argument("--only", choices=sorted({case.workload for case in CASES}), help="one workload")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="updates.json is written there")
    args = parser.parse_args(arguments)
    cases = [
        case
        for case in CASES
        if args.only in (None, case.workload) and case.stage in args.stages and case.ranks in args.ranks
    ]
    if not cases:
        parser.error("nothing is measured with these workloads, stages and ranks")
    torch.set_num_threads(1)
    rows = measure(cases, args.rounds, args.save)
    text = tables(rows)
    print(text)
    return text


if __name__ == "__main__":
    main()
