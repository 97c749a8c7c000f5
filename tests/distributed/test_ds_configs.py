"""Each file of ds_configs/ for the demo starts and trains: on its plan, and as an engine over the toy model.

Those for many nodes (agvm_512_*) are tests/mmdet/planning/test_proposal.py's.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from agvm_ds.deepspeed_json import load_config
from agvm_ds.mmdet.configs import read_config
from agvm_ds.mmdet.plan import make_plan
from tests.engines import started, update
from tests.launch import run_ranks

FILES = sorted((Path(__file__).parents[2] / "ds_configs").glob("*_zero*.json"))


def first_updates() -> dict[str, tuple[bool, list[float]]]:
    """In one rank: file -> whether AGVM is on, and the losses of two updates."""
    found = {}
    for path in FILES:
        optimizer = {"type": "SGD", "params": {"lr": 0.05}}
        config = load_config(path) | {"optimizer": optimizer, "train_micro_batch_size_per_gpu": 4}
        with started(config) as engine:
            found[path.name] = engine.agvm is not None, [loss for t in range(2) for loss in update(engine, t)]
    return found


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bool, list[float]]]:
    result: dict[str, tuple[bool, list[float]]] = run_ranks(first_updates, 1, tmp_path_factory.mktemp("ranks"))[0]
    return result


def test_there_is_a_baseline_for_every_agvm_file() -> None:
    names = {path.name for path in FILES}
    assert {name.replace("agvm", "baseline").replace("_split", "") for name in names} <= names
    assert {f"agvm_zero{stage}.json" for stage in range(4)} <= names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_fits_the_demo_on_one_two_and_four_ranks(path: Path) -> None:
    for ranks in (1, 2, 4):
        assert make_plan(json.loads(path.read_text()), read_config(None), ranks).batch.train == 16


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_trains(path: Path, outcome: dict[str, tuple[bool, list[float]]]) -> None:
    on, losses = outcome[path.name]
    assert on == path.name.startswith("agvm")
    assert len(losses) == 8
    assert all(math.isfinite(loss) for loss in losses)
