"""Files are there whole or not at all, and a place that cannot be written is told before anything is computed."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from agvm_ds.mmdet.process.errors import HostError
from agvm_ds.mmdet.process.outputs import make_folder, refuse_unwritable, written_whole


def test_a_file_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pkl"
    with written_whole(path) as file:
        file.write(b"first")

    def full(descriptor: int) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), written_whole(path) as file:
        file.write(b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_a_file_is_refused(tmp_path: Path) -> None:
    refuse_unwritable("--out", tmp_path / "x.pkl")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(HostError, match=r"--out .*: is a folder"):
        refuse_unwritable("--out", tmp_path)
    with pytest.raises(HostError, match=r"--out no/x.pkl: there is no folder no"):
        refuse_unwritable("--out", Path("no/x.pkl"))
    with pytest.raises(HostError, match=r"--out /proc/x.pkl: cannot be written: "):
        refuse_unwritable("--out", Path("/proc/x.pkl"))


def test_a_folder_is_made_where_it_can_be(tmp_path: Path) -> None:
    make_folder("--show-dir", tmp_path / "a/b")
    assert (tmp_path / "a/b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match=r"--show-dir .*file/b: cannot be written: Not a directory"):
        make_folder("--show-dir", tmp_path / "file/b")
