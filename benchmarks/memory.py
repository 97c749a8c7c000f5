"""What a measured update adds to the peak memory of a rank, in MiB, beside what it may add.

    python -m benchmarks.memory      5 minutes on two cores

Two ranks, a model of 16 million parameters (64 MiB in fp32) whose gradients come in reverse order of definition, two
accumulation steps. Peaks are those of torch's allocator within an update (its profiler's records): the median of three
measured updates less that of three others between them, for one alone differs by up to 16 MiB from the next. Allowed: one
bucket and one gradient shard (half the model) in fp32, and 20 MiB for the runs of a shard worked on at once. It may be
less, where DeepSpeed's own step needs more at another moment.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import save
from tests.engines import ds_config, started
from tests.launch import run_ranks

LAYERS, WIDTH, RANKS, MIB = 16, 1000, 2, 2**20
WORKED_ON = 20
"""MiB for the runs of a shard that are worked on at once."""
REPEATS = 3
MODEL = LAYERS * WIDTH**2
BUCKETS = (500_000_000, 2_000_000)
WAYS = [("SGD", "pairwise"), ("SGD", "split"), ("AdamW", "pairwise"), ("AdamW", "split")]
Run = tuple[int, str, str, int]
RUNS: list[Run] = [(stage, *way, bucket) for stage in range(4) for way in WAYS for bucket in BUCKETS]


class Wide(nn.Module):
    """Layers without bias, each a module's worth."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS // 2)))
        self.head = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS // 2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x)).square().mean()


def peak(engine: Any) -> float:
    """How far one update of two micro-batches goes above the memory that it begins with, in MiB."""
    gc.collect()  # or buffers of an earlier update are dropped in this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(2):
            engine.backward(engine(torch.randn(4, WIDTH)))
            engine.step()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    records = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda event: event["ts"])
    return max(accumulate(int(record["args"]["Bytes"]) for record in records)) / MIB


def added(run: Run) -> float:
    """In a rank: how much higher the peak of a measured update is."""
    stage, base, estimator, bucket = run
    block = {"interval": 2, "estimator": estimator, "reduce_bucket_size": bucket}
    config = ds_config(stage, 2, base, block, train_micro_batch_size_per_gpu=4)
    config["zero_optimization"] |= {"reduce_bucket_size": 2_000_000, "stage3_param_persistence_threshold": 0}
    with started(config, Wide()) as engine:
        for _ in range(2):
            peak(engine)
        measured, unmeasured = zip(*[(peak(engine), peak(engine)) for _ in range(REPEATS)], strict=True)
        return median(measured) - median(unmeasured)


def expected(run: Run) -> float:
    """One bucket and one shard, in MiB: what is allowed."""
    _, base, estimator, bucket = run
    if (base, estimator) == ("SGD", "pairwise"):
        return 0.0
    return (min(bucket, MODEL) + MODEL / RANKS) * 4 / MIB + WORKED_ON


def all_added() -> list[float]:
    """In a rank: one run after another."""
    return [added(run) for run in RUNS]


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, print, save; return the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="memory.json is written there")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        by_rank = run_ranks(all_added, RANKS, Path(place), timeout=900)
    found = {run: max(values) for run, *values in zip(RUNS, *by_rank, strict=True)}
    keys = ("stage", "base", "estimator", "bucket")
    rows = [{**dict(zip(keys, run, strict=True)), "MiB": more, "allowed": expected(run)} for run, more in found.items()]
    save(args.save, "memory", rows)
    text = table(found)
    print(text)
    return text


def table(found: Mapping[Run, float]) -> str:
    """Markdown: a line a way and bucket, a column a stage."""
    lines = ["| base, estimator | bucket, elements | allowed | stage 0 | 1 | 2 | 3 |", "|---|---|---|---|---|---|---|"]
    for base, estimator in WAYS:
        for bucket in BUCKETS:
            row = [f"{found[stage, base, estimator, bucket]:.0f}" for stage in range(4)]
            should = f"{expected((0, base, estimator, bucket)):.0f}"
            lines.append(f"| {base}, {estimator} | {bucket:.0e} | {should} | {' | '.join(row)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
