"""What a measured update adds to the peak memory of a rank, in MiB, beside what it should be.

    python -m benchmarks.memory      2 minutes on two cores

Two ranks, a model of 16 million parameters (64 MiB in fp32) whose gradients come in reverse order of definition. The peak is
the kernel's own (VmHWM of the process), of an update that is measured less that of one that is not. Expected: one bucket
and one gradient shard (half the model) in fp32, and some 50 MiB for the runs of a shard that are worked on at once.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.engines import ds_config, started
from tests.launch import run_ranks

LAYERS, WIDTH, RANKS, MIB = 16, 1000, 2, 2**20
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


def peak() -> float:
    """The process's peak resident memory since the last ``reset``, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def reset() -> None:
    """Let the peak begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def update(engine: Any) -> float:
    """One update of two micro-batches; its peak."""
    reset()
    for _ in range(2):
        engine.backward(engine(torch.randn(4, WIDTH)))
        engine.step()
    return peak()


def added(run: Run) -> float:
    """In a rank: how much higher the peak of measured updates is, the median of three pairs."""
    stage, base, estimator, bucket = run
    block = {"interval": 2, "estimator": estimator, "reduce_bucket_size": bucket}
    config = ds_config(stage, 2, base, block, train_micro_batch_size_per_gpu=4)
    config["zero_optimization"] |= {"reduce_bucket_size": 2_000_000, "stage3_param_persistence_threshold": 0}
    with started(config, Wide()) as engine:
        for _ in range(2):
            update(engine)
        differences = []
        for _ in range(3):
            measured = update(engine)
            differences.append(measured - update(engine))
    return sorted(differences)[1]


def expected(run: Run) -> float:
    """One bucket and one shard, in MiB."""
    _, base, estimator, bucket = run
    if (base, estimator) == ("SGD", "pairwise"):
        return 0.0
    return (min(bucket, MODEL) + MODEL / RANKS) * 4 / MIB


def all_added() -> list[float]:
    """In a rank: one run after another."""
    return [added(run) for run in RUNS]


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as place:
        by_rank = run_ranks(all_added, RANKS, Path(place), timeout=900)
    print("| base, estimator | bucket, elements | bucket + shard | stage 0 | 1 | 2 | 3 |")
    print("|---|---|---|---|---|---|---|")
    found = {run: max(values) for run, *values in zip(RUNS, *by_rank, strict=True)}
    for base, estimator in WAYS:
        for bucket in BUCKETS:
            row = [f"{found[stage, base, estimator, bucket]:.0f}" for stage in range(4)]
            should = f"{expected((0, base, estimator, bucket)):.0f}"
            print(f"| {base}, {estimator} | {bucket:.0e} | {should} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
