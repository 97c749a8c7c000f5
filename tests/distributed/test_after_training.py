"""launch/test.py and launch/export.py on what a run leaves: a DeepSpeed checkpoint is as good as a .pth."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from agvm_ds.mmdet.testing.export import ExportOptions, export
from tests.trainer import ROOT, launch, logged


def results_of(place: Path, config: Path, checkpoint: Path, *words: str, ranks: int = 2) -> list[Any]:
    """The raw results of launch/test.py."""
    outcome = launch("test.py", [str(config), str(checkpoint), "--out", str(place / "raw.pkl"), *words], place, ranks)
    assert outcome.good, outcome.output
    return pickle.loads((place / "raw.pkl").read_bytes())  # type: ignore[no-any-return]


def assert_same(one: list[Any], other: list[Any]) -> None:
    """Boxes by image and class, to the bit."""
    assert len(one) == len(other) == 8
    assert all(np.array_equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.fixture(scope="module")
def raw(learned: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Of the published weights, on the ranks that trained them."""
    return results_of(tmp_path_factory.mktemp("raw"), learned.parent / "config.py", learned)


def test_a_deepspeed_checkpoint_is_measured_like_its_pth_on_other_ranks(
    learned: Path, digits: Path, raw: list[Any], tmp_path: Path
) -> None:
    """Saved by two ranks, tested by three, of which two draw three images and one draws two."""
    work = learned.parent
    words = ["--json", str(tmp_path / "m.json"), "--show-dir", str(tmp_path / "shown")]
    assert_same(raw, results_of(tmp_path, work / "config.py", work / "deepspeed", *words, ranks=3))
    written = json.loads((tmp_path / "m.json").read_text())
    assert written["images"] == 8
    assert written["metric"]["bbox_mAP"] == pytest.approx(logged(learned.parent)[-1]["bbox_mAP"], abs=1e-3)
    drawn = sorted((tmp_path / "shown").iterdir())
    assert [path.name for path in drawn] == [f"{number:06}.png" for number in range(1, 9)]
    original = {path.name: cv2.imread(str(path)) for path in (digits / "val").iterdir()}
    assert all(cv2.imread(str(path)).shape == original[path.name].shape for path in drawn)
    assert all((cv2.imread(str(path)) != original[path.name]).any() for path in drawn)


def test_result_files_are_those_of_the_data_set(learned: Path, raw: list[Any], tmp_path: Path) -> None:
    words = ["--format-only", str(tmp_path / "sent"), "--json", str(tmp_path / "m.json")]
    results_of(tmp_path, learned.parent / "config.py", learned.parent / "deepspeed" / "epoch_48", *words)
    entries = json.loads((tmp_path / "sent.bbox.json").read_text())
    assert len(entries) == sum(len(boxes) for image in raw for boxes in image)
    assert {entry["image_id"] for entry in entries} <= set(range(1, 9))
    written = json.loads((tmp_path / "m.json").read_text())
    assert (written["metric"], written["files"]) == ({}, [str(tmp_path / "sent.bbox.json")])
    assert {path.name for path in tmp_path.iterdir()} == {"raw.pkl", "sent.bbox.json", "m.json", "output_0.txt"}


def test_an_exported_file_gives_plain_mmdet_the_same_results(learned: Path, raw: list[Any], tmp_path: Path) -> None:
    from mmcv import Config
    from mmdet.apis import inference_detector, init_detector

    work = learned.parent
    words = map(str, [work / "config.py", work / "deepspeed", tmp_path / "digits.pth"])
    command = [sys.executable, str(ROOT / "launch/export.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    file = Path(done.stdout.splitlines()[-1])
    assert list(tmp_path.iterdir()) == [file]
    sha = subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True).stdout[:8]
    assert file.name == f"digits-{sha}.pth"
    config = Config.fromfile(str(work / "config.py"))
    with warnings.catch_warnings():
        detector = init_detector(str(work / "config.py"), str(file), device="cpu")
        images = sorted(Path(config.data.test.img_prefix).iterdir())
        assert_same(raw, [inference_detector(detector, str(image)) for image in images])
    content = torch.load(file, weights_only=True)
    assert content.keys() == {"meta", "state_dict"}
    assert {value.dtype for value in content["state_dict"].values()} == {torch.float32}
    meta = content["meta"]
    assert (meta["epoch"], meta["iter"], meta["CLASSES"]) == (48, 48, list("0123456789"))
    assert meta["config"] == Config.fromfile(str(work / "config.py")).pretty_text
    assert len(meta["PALETTE"]) == 10 and meta["mmdet_version"] == "2.28.2"


def test_a_pth_and_its_deepspeed_checkpoint_export_to_the_same_bytes(learned: Path, tmp_path: Path) -> None:
    names = set()
    for checkpoint in (learned, learned.parent / "deepspeed" / "epoch_48"):
        options = ExportOptions(str(learned.parent / "config.py"), str(checkpoint), tmp_path / "digits.pth")
        names.add(export(options).name)
    assert len(names) == 1


def test_a_damaged_checkpoint_is_found_before_it_is_used(learned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deepspeed"
    shutil.copytree(learned.parent / "deepspeed", folder)
    path = folder / "epoch_48" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    with path.open("r+b") as file:
        file.seek(2000)
        file.write(b"\x00\x01\x02")
    said = f"{path}: not the bytes that were written (SHA-256 differs)"
    config = str(learned.parent / "config.py")
    outcome = launch("test.py", [config, str(folder), "--out", str(tmp_path / "raw.pkl")], tmp_path)
    assert outcome.codes == [2, 2], outcome.output
    assert outcome.output.count("error: ") == 1 and said in outcome.output
    outcome = launch("export.py", [config, str(folder), str(tmp_path / "digits.pth")], tmp_path, ranks=1)
    assert outcome.codes == [2] and outcome.output.count("error: ") == 1 and said in outcome.output
    assert {path.name for path in tmp_path.iterdir()} == {"deepspeed", "output_0.txt", "output_1.txt"}
