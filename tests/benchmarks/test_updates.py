"""The benchmark of an update's time: its arithmetic, and that the naive way finds the same variances."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.naive import NaiveSplit
from benchmarks.updates import INTERVAL, WARM_UP, Case, Way, ratio, rows_of, tables
from benchmarks.workloads import demo, ds_config, engine_of, update
from tests.launch import run_ranks


def test_ratio_puts_measured_and_unmeasured_updates_together() -> None:
    way = Way("pairwise", {}, INTERVAL)
    measured = [(t + WARM_UP) % INTERVAL == 0 for t in range(40)]
    found = ratio(way, [3.0 if m else 1.5 for m in measured], [1.0] * 40)
    assert found.median == pytest.approx((3.0 + 9 * 1.5) / 10)
    assert found.low == found.high == pytest.approx(found.median)


def test_ratio_is_of_updates_of_the_same_round() -> None:
    found = ratio(Way("plain, again"), [2.0, 20.0, 8.0], [1.0, 10.0, 4.0])
    assert (found.median, found.low, found.high) == (2.0, 2.0, 2.0)
    assert ratio(Way("plain, again"), [1.0, 2.0, 4.0] * 5, [1.0] * 15).low < 2.0


def test_table_has_a_line_a_way_and_a_column_a_stage() -> None:
    ways = [Way("plain"), Way("plain, again"), Way("split", {}, 1)]
    rows = [
        row for stage in (0, 3) for row in rows_of(Case("demo", stage, 2, ways), [[0.1] * 12, [0.1] * 12, [0.2] * 12])
    ]
    lines = tables(rows).splitlines()
    assert "| split | 1 | 2.000 (2.000-2.000) | 2.000 (2.000-2.000) |" in lines
    assert "| plain, an update | | 100 ms | 100 ms |" in lines


def _both(stage: int) -> tuple[dict[str, float], dict[str, float]]:
    work = demo(2)
    block = {"estimator": "split", "precondition": "none", "interval": 1}
    with ExitStack() as stack:
        ours = stack.enter_context(engine_of(work, ds_config(work, stage, "SGD", block)))
        plain = stack.enter_context(engine_of(work, ds_config(work, stage, "SGD", None)))
        naive = NaiveSplit(plain, work.modules, 1)
        for engine in (ours, plain):
            update(engine, work, 0)
        return dict(ours.agvm.variances), naive.variances


@pytest.mark.parametrize("stage", [2, 3])
def test_the_naive_way_finds_what_split_finds(stage: int, tmp_path: Path) -> None:
    for ours, naive in run_ranks(_both, 2, tmp_path, stage):
        assert list(ours) == list(naive)
        assert ours == pytest.approx(naive, abs=1e-5)
        assert all(0 < phi <= 2 for phi in naive.values())
