"""A .pth is read as data; what it holds beside runs only when the user says so."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from agvm_ds.checkpoints import NotWrittenError
from agvm_ds.config import ConfigError
from agvm_ds.mmdet.detector.weights import load_weights, publish

LOGGER = logging.getLogger("tests")


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def pth(place: Path, meta: Any) -> tuple[nn.Module, str]:
    net = nn.Linear(2, 2)
    torch.save(
        {"state_dict": {name: value + 1 for name, value in net.state_dict().items()}, "meta": meta}, place / "x.pth"
    )
    return net, str(place / "x.pth")


def test_code_in_a_pth_is_not_run(tmp_path: Path) -> None:
    net, file = pth(tmp_path, Trap(tmp_path / "sprung"))
    with pytest.raises(
        ConfigError, match=r"x.pth: holds posix.mkdir, and reading that can run code.*--trust-checkpoint"
    ):
        load_weights(net, file, LOGGER)
    assert not (tmp_path / "sprung").exists()
    load_weights(net, file, LOGGER, trust=True)
    assert (tmp_path / "sprung").exists()


def test_an_old_pth_with_numpy_in_it_is_read_when_trusted(tmp_path: Path) -> None:
    net, file = pth(tmp_path, {"mAP": np.float64(0.37)})
    before = net.weight.detach().clone()
    with pytest.raises(ConfigError, match="holds numpy"):
        load_weights(net, file, LOGGER)
    with pytest.warns(UserWarning, match="forcing weights_only=False"):
        load_weights(net, file, LOGGER, trust=True)
    assert torch.equal(net.weight, before + 1)


def test_mmdets_own_report_of_missing_and_unexpected_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"state_dict": {"weight": torch.ones(2, 2), "scale": torch.ones(1)}}, tmp_path / "x.pth")
    net = nn.Linear(2, 2)
    load_weights(net, str(tmp_path / "x.pth"), LOGGER)
    assert "unexpected key in source state_dict: scale" in caplog.text
    assert "missing keys in source state_dict: bias" in caplog.text
    assert torch.equal(net.weight, torch.ones(2, 2))


def test_a_whole_pth_may_lack_batch_norms_counts_and_nothing_else(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for lacks in ("1.num_batches_tracked", "1.running_mean"):
        kept = {name: value for name, value in net.state_dict().items() if name != lacks}
        torch.save({"state_dict": kept}, tmp_path / f"{lacks}.pth")
    load_weights(net, str(tmp_path / "1.num_batches_tracked.pth"), LOGGER, whole=True)
    with pytest.raises(ConfigError, match="1 of the detector's 6 weights are not in it, .*: 1.running_mean"):
        load_weights(net, str(tmp_path / "1.running_mean.pth"), LOGGER, whole=True)


@pytest.mark.parametrize("trust", [False, True])
def test_what_is_no_pth_is_told(trust: bool, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"hello" * 100)
    with pytest.raises(ConfigError, match=r"x.pth: cannot be loaded as a .pth: "):
        load_weights(nn.Linear(2, 2), str(tmp_path / "x.pth"), LOGGER, trust)


def test_a_full_disk_leaves_the_pth_before_and_no_draft(tmp_path: Path) -> None:
    (tmp_path / "latest.pth").write_text("the one before")
    (tmp_path / ".latest.pth.tmp").symlink_to("/dev/full")
    with pytest.raises(NotWrittenError, match=r"latest.pth cannot be written: .*; make room"):
        publish({"x": torch.zeros(10000)}, {}, tmp_path / "latest.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["latest.pth"]
    assert (tmp_path / "latest.pth").read_text() == "the one before"


def test_a_folder_that_is_not_there_is_made(tmp_path: Path) -> None:
    """``checkpoint_config.out_dir`` has, as in mmcv, a folder of the work dir's name in it."""
    publish({}, {}, tmp_path / "out/run/epoch_1.pth")
    assert torch.load(tmp_path / "out/run/epoch_1.pth", weights_only=True) == {"meta": {}, "state_dict": {}}
