"""The benchmark of the trainer: its clock and sums, and whole commands of a few updates."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.trainer import MMDET, parts, phases, speeds
from benchmarks.trainer_clock import AGVM, DATA, REST, STEP, Stopwatch
from benchmarks.turns import ROOT, Launch

TRAINER = "launch/train.py, ZeRO 0"


class Sleeper:
    now = 5.0

    def outer(self) -> None:
        self.now += 2
        self.inner()
        self.inner()

    def inner(self) -> None:
        self.now += 3


def test_what_is_timed_within_a_phase_counts_for_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, sleeper = Stopwatch(), Sleeper()
    monkeypatch.setattr("benchmarks.trainer_clock.time.monotonic", lambda: sleeper.now)
    watch.timed(sleeper, "outer", "outer")
    watch.timed(sleeper, "inner", "inner")
    with pytest.raises(AttributeError, match="absent"):
        watch.timed(sleeper, "absent", "a phase of no time")
    sleeper.outer()
    assert watch.spent == {"inner": 6, "outer": 2}
    assert watch.outermost == 8
    watch.restart()
    assert watch.outermost == 0 and not watch.spent


def turn(seconds: float) -> list[dict[str, Any]]:
    update = {"start": 5.0, "end": 5.0 + seconds, "cpu": seconds, "loss": 3.0}
    return [{**update, "spent": {DATA: 0.25 * seconds, STEP: 0.5 * seconds, REST: 0.25 * seconds}}] * 2


def test_ratios_are_of_the_same_round() -> None:
    turns = {MMDET: [turn(1.0), turn(10.0), turn(2.0)], TRAINER: [turn(2.0), turn(10.0), turn(0.5)]}
    launches = [Launch(name, ROOT, None, 4.0, updates=turn(1.0)) for name in turns]  # type: ignore[arg-type]
    row = speeds(turns, launches)[1]
    assert (row["least"], row["of mmdet's"], row["largest"], row["of bare DeepSpeed's"]) == (0.5, 1.0, 4.0, "")
    assert (row["images/s"], row["start, s"]) == (4.0, 1.0)
    found = phases(turns)[0]
    assert (found["update"], found[DATA], found[STEP], found[AGVM]) == (2000, 500, 1000, 0)


def test_parts_are_of_a_whole_and_in_updates() -> None:
    *_, step, whole = parts({"data": 1.0, "step": 3.0}, update=0.5, size=2**20)
    assert step == {"part": "step", "MiB": 1.0, "ms": 3000.0, "updates": 6.0, "%": 75.0}
    assert (whole["updates"], whole["%"]) == (8.0, 100.0)


def measured(place: Path, *words: str) -> dict[str, Any]:
    """The tables of a command."""
    command = [sys.executable, "-m", "benchmarks.trainer", *words, "--save", str(place)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=400)
    text = (place / "trainer.json").read_text()
    assert str(ROOT) not in text and socket.gethostname() not in text
    tables: dict[str, list[Any]] = {}
    for row in json.loads(text)["rows"]:
        tables.setdefault(row.pop("table"), []).append(row)
    return tables


@pytest.mark.extended
def test_each_trainer_does_the_same_work(tmp_path: Path) -> None:
    """Three launches: mmdet's own trainer, a bare engine, and launch/train.py begin with the same loss."""
    tables = measured(tmp_path, "--only", "throughput", "--stages", "0", "--rounds", "1", "--updates", "2")
    rows = tables["Images per second"]
    assert [row["trainer"] for row in rows] == [MMDET, "bare DeepSpeed, ZeRO 0", TRAINER]
    assert len({row["first loss"] for row in rows}) == 1
    for row in tables["Where the time of an update goes, ms"]:
        assert row["forward"] > 1 and row["backward"] > 1 and row["step"] > 0.1, row
        assert sum(list(row.values())[2:]) == pytest.approx(row["update"], rel=0.01)


@pytest.mark.extended
def test_checkpoints_and_resuming_are_measured(tmp_path: Path) -> None:
    tables = measured(tmp_path, "--only", "checkpoints", "--updates", "2")
    for rows in (tables["A checkpoint"], tables["--resume"]):
        assert all(row["ms"] > 0 for row in rows), rows
        assert [row["%"] for row in rows if row["part"] == "all"] == pytest.approx([100, 100])
