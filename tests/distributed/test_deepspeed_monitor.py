"""What DeepSpeed's monitor is given is what agvm.jsonl has: docs/watching.md's events, on the axis of samples."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

from agvm_ds.monitor import JsonLines
from tests.engines import AGVM_BLOCK, ROWS, ds_config, started, update
from tests.launch import run_ranks

RANKS, ACCUMULATION, UPDATES = 2, 2, 7
QUANTITIES = ("variance", "ratio", "scale_factor", "lr", "effective_lr", "noise_scale", "noise", "signal")


def watched(place: Path) -> None:
    """In a rank: a run with DeepSpeed's CSV writer, and agvm.jsonl."""
    settings = {"enabled": True, "output_path": str(place), "job_name": "toy"}
    with started(ds_config(2, ACCUMULATION, agvm=AGVM_BLOCK, csv_monitor=settings)) as engine:
        if engine.global_rank == 0:
            engine.agvm.listeners.append(JsonLines(place / "agvm.jsonl", engine.agvm))
        for t in range(UPDATES):
            update(engine, t)


def test_each_finite_number_of_a_measure_is_an_event(tmp_path: Path) -> None:
    run_ranks(watched, RANKS, tmp_path, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "agvm.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [2, 4, 6]
    expected: dict[str, list[tuple[float, float]]] = {"Train_AGVM_update": []}
    for line in lines:
        samples = (line["update"] + 1) * RANKS * ACCUMULATION * ROWS
        expected["Train_AGVM_update"].append((samples, line["update"]))
        for name, numbers in line["modules"].items():
            assert tuple(numbers) == QUANTITIES
            for quantity, number in numbers.items():
                if number is not None and math.isfinite(float(number)):
                    expected.setdefault(f"Train_AGVM_{name}_{quantity}", []).append((samples, number))
    assert "Train_AGVM_neck_noise" in expected and "Train_AGVM_aux_head_variance" not in expected, "which has none"
    found = {}
    for file in (tmp_path / "toy").glob("Train_AGVM_*.csv"):
        rows = list(csv.reader(file.read_text().splitlines()))[1:]
        found[file.stem] = [(float(samples), float(number)) for samples, number in rows]
    assert found == expected
