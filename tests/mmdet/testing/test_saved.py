"""Which folder is a checkpoint, and what is said of one that is not, or is damaged; whole ones are in tests/distributed."""

from __future__ import annotations

from pathlib import Path

import pytest

from agvm_ds.checkpoints import CheckpointError
from agvm_ds.mmdet.process.errors import HostError
from agvm_ds.mmdet.testing.saved import read_published
from tests.checkpoints.test_vault import written


def test_a_folder_without_checkpoints_is_told_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"is no DeepSpeed checkpoint of launch/train.py: give WORK_DIR/deepspeed"):
        read_published(tmp_path)


def test_a_lost_newest_checkpoint_is_told_with_what_there_is(tmp_path: Path) -> None:
    written(tmp_path, "epoch_1", 6)
    (tmp_path / "latest").write_text("epoch_2")
    with pytest.raises(CheckpointError, match=r"latest names epoch_2, which is not there; there are: epoch_1"):
        read_published(tmp_path)


@pytest.mark.parametrize("named", ["", "epoch_1"])
def test_damage_is_told_before_anything_is_read(named: str, tmp_path: Path) -> None:
    """The file is no checkpoint at all: with the right digest, reading it would be another error."""
    (written(tmp_path, "epoch_1", 6) / "x.pt").write_bytes(b"epoch_X")
    with pytest.raises(CheckpointError, match=r"epoch_1 is damaged:\n.*x.pt: not the bytes that were written"):
        read_published(tmp_path / named)


def test_a_damaged_manifest_is_told(tmp_path: Path) -> None:
    (written(tmp_path, "epoch_1", 6) / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"epoch_1 is damaged:\n.*manifest.json: damaged"):
        read_published(tmp_path)
