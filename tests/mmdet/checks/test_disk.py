"""The room that a run's checkpoints need; what they really take is tests/distributed/test_trainer.py's."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from agvm_ds.mmdet.checks.disk import Checkpoints, checkpoints_of, too_little_room
from agvm_ds.mmdet.configs import read_config
from agvm_ds.mmdet.planning.memory import footprint

ONE_A_RUN = {"runner.max_epochs": 6, "checkpoint_config.interval": 6, "checkpoint_config.max_keep_ckpts": -1}


def test_bytes_are_those_of_the_parameters() -> None:
    cfg = read_config(None, {"model.backbone.frozen_stages": 1, **ONE_A_RUN})
    sizes = footprint(cfg)
    assert sizes.trainable < sizes.parameters
    found = checkpoints_of(cfg, states=1)
    assert found == Checkpoints(1, 4 * sizes.parameters, 4 * sizes.parameters + 8 * sizes.trainable)
    assert checkpoints_of(cfg).state == found.state + 4 * sizes.trainable


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({"checkpoint_config.interval": 2}, 3),
        ({"checkpoint_config.interval": 1, "checkpoint_config.max_keep_ckpts": 3}, 4),
        ({"checkpoint_config.interval": 4, "checkpoint_config.max_keep_ckpts": 3}, 1),
        ({"checkpoint_config": None}, 0),
        ({"runner": {"type": "IterBasedRunner", "max_iters": 100}, "checkpoint_config.interval": 10}, 10),
    ],
)
def test_how_many_are_there_at_once(options: dict[str, object], number: int) -> None:
    """One more than stay: a checkpoint is written before an older one is removed."""
    assert checkpoints_of(read_config(None, {**ONE_A_RUN, **options})).number == number


def test_a_full_disk_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cfg = read_config(None, ONE_A_RUN)
    total = checkpoints_of(cfg).total
    asked: list[Path] = []

    def usage(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda place: asked.append(place) or SimpleNamespace(free=free))

    usage(total)
    assert too_little_room(cfg, tmp_path / "not/yet") is None
    usage(total - 1)
    said = too_little_room(cfg, tmp_path / "not/yet")
    assert said is not None and "1 x (" in said and "--keep N" in said
    assert asked == [tmp_path] * 2
