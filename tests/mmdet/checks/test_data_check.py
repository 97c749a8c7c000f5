"""The data of a config: which files are looked through, what for, and what launch/check_data.py prints."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mmcv import Config

from agvm_ds.mmdet.checks.annotations import Use
from agvm_ds.mmdet.checks.data_check import check_data, check_on_hosts
from agvm_ds.mmdet.configs import read_config
from agvm_ds.mmdet.process.errors import HostError
from agvm_ds.mmdet.train import TrainOptions, splits_read
from tests.launch import run_ranks
from tests.mmdet import coco
from tests.trainer import ROOT, write_config


def config(place: Path, lines: str = "") -> Config:
    coco.write(place)
    return read_config(str(write_config(place, coco.config_lines(place) + lines)))


def test_each_split_is_looked_through_for_its_own_use(tmp_path: Path) -> None:
    checked = check_data(config(tmp_path), ["train", "val", "test"], metrics=["bbox", "segm"])
    trained, evaluated = (Use(coco.CLASSES, trained=True, masks=True), Use(coco.CLASSES, trained=False, masks=True))
    assert [(s.where, s.use) for s in checked.sources] == [
        ("data.train", trained),
        ("data.val", evaluated),
        ("data.test", evaluated),
    ]
    assert checked.lines() == []
    assert len(checked.reports) == 2  # val and test are one file, read once


def test_wrappers_and_lists_of_files_are_gone_through(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    plain = dict(cfg.data.train)
    two = {**plain, "ann_file": [str(tmp_path / "train.json"), str(tmp_path / "val.json")]}
    cfg.data.train = [
        {"type": "RepeatDataset", "times": 2, "dataset": two},
        {"type": "ConcatDataset", "datasets": [plain]},
    ]
    checked = check_data(cfg, ["train"])
    assert [(s.where, s.file.name) for s in checked.sources] == [
        ("data.train[0].dataset", "train.json"),
        ("data.train[0].dataset", "val.json"),
        ("data.train[1].datasets[0]", "train.json"),
    ]


def test_missing_files_are_listed_together_and_only_of_what_a_run_reads(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    cfg.data.train.ann_file, cfg.data.val.img_prefix, cfg.data.test.ann_file = "no/a.json", "no/b", "no/c.json"
    assert check_data(cfg, ["train", "val"]).lines() == [
        "data.train.ann_file: not found: no/a.json",
        "data.val.img_prefix: not found: no/b",
    ]
    assert splits_read(TrainOptions(deepspeed_config="", validate=False), cfg) == ["train"]
    cfg.workflow = [("train", 1), ("val", 1)]
    assert splits_read(TrainOptions(deepspeed_config="", validate=False), cfg) == ["train", "val"]


@pytest.mark.parametrize(
    "lines",
    [
        'data["train"]["type"] = "CocoPanopticDataset"',
        'data["train"]["type"] = "NoSuchDataset"',
        'data["train"]["file_client_args"] = dict(backend="petrel")',
    ],
)
def test_other_kinds_of_data_are_not_looked_through(lines: str, tmp_path: Path) -> None:
    cfg = config(tmp_path, lines)
    (tmp_path / "train.json").write_text("no JSON")
    (source,) = check_data(cfg, ["train"]).sources
    assert source.use is None and source.report is None


def test_images_elsewhere_are_not_looked_for(tmp_path: Path) -> None:
    cfg = config(tmp_path, 'train_pipeline[0]["file_client_args"] = dict(backend="petrel")')
    (tmp_path / "images/1.png").unlink()
    cfg.data.train.img_prefix = "s3://bucket/train"
    assert check_data(cfg, ["train"]).lines() == []
    assert len(check_data(cfg, ["val"]).lines()) == 1
    cfg.data.val.img_prefix = "s3://bucket/val"
    assert check_data(cfg, ["val"]).lines() == ["data.val.img_prefix: not found: s3:/bucket/val"]


def test_metrics_are_those_that_will_be_asked_for(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    assert check_data(cfg, ["test"], metrics=["segm", "proposal"]).lines() == []
    assert "'mAP': not known" in check_data(cfg, ["test"], metrics=["mAP"]).lines()[0]
    assert check_data(cfg, ["train"], metrics=["mAP"]).lines() == []


def test_one_rank_of_a_host_looks_and_all_are_told(tmp_path: Path) -> None:
    config(tmp_path)
    (tmp_path / "train.json").write_text("{")
    said = run_ranks(_checked, 2, tmp_path, str(tmp_path / "digits_config.py"))
    assert said[0] == said[1]
    assert "not in order (launch/check_data.py tells everything)" in said[0] and "line 1, column 2" in said[0]


def test_another_host_whose_data_are_good_stops_too(tmp_path: Path) -> None:
    config(tmp_path)
    said = run_ranks(_checked_on_two_hosts, 2, tmp_path, str(tmp_path / "digits_config.py"))
    assert "ann_file: not found" in said[0]
    assert said[1] == "the data are not in order on host0, which tells more"


def _checked(path: str) -> str:
    with pytest.raises(HostError) as caught:
        check_on_hosts(read_config(path), ["train"])
    return str(caught.value)


def _checked_on_two_hosts(path: str) -> str:
    import os
    import socket

    rank = os.environ["RANK"]
    os.environ["LOCAL_RANK"] = "0"
    socket.gethostname = lambda: f"host{rank}"
    cfg = read_config(path)
    if rank == "0":
        cfg.data.train.ann_file = "nowhere.json"
    with pytest.raises(HostError) as caught:
        check_on_hosts(cfg, ["train"])
    return str(caught.value)


def check(place: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of ``launch/check_data.py``."""
    monkeypatch.setattr(sys, "argv", ["check_data.py", str(place / "digits_config.py"), *words])
    monkeypatch.setenv("COLUMNS", "200")
    try:
        runpy.run_path(str(ROOT / "launch/check_data.py"), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command_prints_what_it_looked_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config(tmp_path)
    assert check(tmp_path, monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "data.train" in printed and "2 of 2" in printed and "the data are in order" in printed


def test_the_command_warns_of_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10_000))
    assert check(tmp_path, monkeypatch, "--work-dir", "W") == 0
    printed = capsys.readouterr().out
    assert "warning" in printed and "--work-dir W: 0.0 GiB are free" in printed


def test_the_command_ends_with_2_and_decodes_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config(tmp_path)
    image = tmp_path / "images/2.png"
    image.write_bytes(image.read_bytes()[:500])
    assert check(tmp_path, monkeypatch) == 0
    assert check(tmp_path, monkeypatch, "--decode", "--workers", "2") == 2
    assert "image that cannot be decoded" in capsys.readouterr().out
    assert check(tmp_path, monkeypatch, "--decode", "--workers", "0") == 2
    assert "--workers 0: must be at least 1" in capsys.readouterr().err


def test_the_command_tells_notes_and_refusals_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config(tmp_path)
    data: dict[str, Any] = coco.content()
    data["annotations"][0]["bbox"] = [0, 0, 0, 5]
    (tmp_path / "train.json").write_text(json.dumps(data))
    assert check(tmp_path, monkeypatch) == 0
    assert "noted" in capsys.readouterr().out
    data["annotations"][1]["bbox"] = [0, 0, -3, 5]
    (tmp_path / "train.json").write_text(json.dumps(data))
    assert check(tmp_path, monkeypatch, "--splits", "val") == 0
    assert check(tmp_path, monkeypatch, "--splits", "train") == 2
    printed = capsys.readouterr().out
    assert "refused" in printed and "a box is [x, y, width, height]" in printed
