"""The workload of a GPU's benchmarks, small and on a CPU: a detector on images that are made up; and the table of peaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import peaks
from benchmarks.workloads import ds_config, engine_of, random_images, update
from tests.launch import run_ranks


def measured() -> tuple[float, dict[str, float]]:
    """In a rank: the loss, and the variances of an update."""
    work = random_images(peaks.CONFIGS[0], micro=1, size=(64, 96))
    config = ds_config(work, 2, "SGD", {"interval": 1, "start_step": 0}, gradient_accumulation_steps=2)
    with engine_of(work, config) as engine:
        loss = work.loss(engine, 0).item()
        update(engine, work, 0)
        return loss, dict(engine.agvm.variances)


def test_a_detector_is_measured_on_images_that_are_made_up(tmp_path: Path) -> None:
    [(loss, variances)] = run_ranks(measured, 1, tmp_path)
    assert 0 < loss < 100 and list(variances) == ["backbone", "neck", "rpn_head", "roi_head"]
    assert all(0 <= phi <= 2 for phi in variances.values()) and variances["backbone"] > 0, "the same image twice"


def test_the_table_tells_how_much_of_the_estimate_is_used() -> None:
    table = peaks.table({"some_config": peaks.Peak(1.0, 8.0, 6.0)}).splitlines()
    assert table[-1] == "| some_config | 1.00 GiB | 8.00 GiB | 6.00 GiB | 0.75 |"


def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peaks.main([])
    assert "needs a GPU, and DS_ACCELERATOR=cuda" in capsys.readouterr().err
