"""What several files of tests start from: a little data, and a detector that has learned some of it by heart."""

from __future__ import annotations

from pathlib import Path

import pytest

from agvm_ds.demo.data import ensure
from tests.distributed.learning import by_heart, run
from tests.trainer import logged


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure(tmp_path_factory.mktemp("data") / "digits", train=48, val=8)


@pytest.fixture(scope="session")
def learned(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"train_batch_size": 8, "zero_optimization": {"stage": 2}}
    work = run(tmp_path_factory.mktemp("learned"), digits, settings, by_heart(digits))
    assert logged(work)[-1]["bbox_mAP"] > 0.4
    return work / "latest.pth"
