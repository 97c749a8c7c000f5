"""What launch/test.py and launch/export.py refuse in one message, before anything is computed, with no file left."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import agvm_ds.mmdet.testing.export
import agvm_ds.mmdet.testing.test
from agvm_ds.config import ConfigError
from agvm_ds.mmdet.checks.data_check import check_on_hosts
from agvm_ds.mmdet.evaluate import plain_detector
from agvm_ds.mmdet.testing.test import TestOptions, prepare
from tests.mmdet import coco
from tests.trainer import ROOT, write_config


def up_to_the_model(options: TestOptions) -> dict[str, float]:
    """What ``test`` does before it needs other ranks."""
    check_on_hosts(prepare(options), ["test"], options.allow_other_categories, options.metrics)
    return {}


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A program of launch/ in this process, on the demo's detector and a small COCO data set, with these words."""
    coco.write(tmp_path)
    config = write_config(tmp_path, coco.config_lines(tmp_path))
    monkeypatch.setattr(agvm_ds.mmdet.testing.test, "test", up_to_the_model)

    def run(script: str, *words: str) -> Any:
        placed = [word.replace("{place}", str(tmp_path)) for word in words]
        monkeypatch.setattr(sys, "argv", [script, str(config), *placed])
        return runpy.run_path(str(ROOT / "launch" / script))["main"]()

    return run


def weights(place: Path, without: str | None = None, **more: Any) -> str:
    """A .pth of the demo's detector."""
    from agvm_ds.mmdet.configs import read_config

    state = plain_detector(read_config(None), "cpu").state_dict()
    kept = {name: value for name, value in state.items() if not (without and name.startswith(without))}
    torch.save({"state_dict": kept, **more}, place / "x.pth")
    return str(place / "x.pth")


def files(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()}


GOOD = ["--out", "{place}/r.pkl", "--json", "{place}/m.json", "--show-dir", "{place}/shown", "--eval", "bbox"]
REFUSED = {
    "checkpoint": (["no.pth"], "checkpoint not found: no.pth"),
    "raw results": (["{place}", "--out", "r.json"], "--out r.json: raw results are a pickle"),
    "folder of --json": (["{place}", "--json", "{place}/no/m.json"], "there is no folder"),
    "--out a folder": (["{place}", "--out", "{place}/f.pkl"], "f.pkl: is a folder"),
    "--show-dir a file": (["{place}", "--show-dir", "{place}/ds.txt"], "ds.txt: cannot be written"),
    "metric": (["{place}", "--eval", "bbox", "PQ"], "'PQ': not known; allowed: bbox, segm, proposal"),
    "both": (["{place}", "--eval", "bbox", "--format-only", "x"], "--format-only: not allowed with argument --eval"),
    "threshold": (["{place}", "--show-score-thr", "high"], "invalid float value: 'high'"),
    "no result files": (
        ["{place}", "--format-only", "{place}/x", "--cfg-options", "data.test.type=VOCDataset"],
        "--format-only: data.test is VOCDataset: only",
    ),
}


def test_what_every_row_spoils_is_accepted(start: Callable[..., Any], tmp_path: Path) -> None:
    start("test.py", "{place}", *GOOD)
    start("test.py", "{place}", "--format-only", "{place}/x")
    assert not files(tmp_path) & {"r.pkl", "m.json"}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_to_test_is_refused(name: str, start: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "f.pkl").mkdir()
    (tmp_path / "ds.txt").touch()
    before = files(tmp_path)
    words, said = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        start("test.py", *words)
    assert said in str(caught.value)
    assert files(tmp_path) == before


def test_a_pth_is_exported_with_what_its_meta_says(
    start: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    meta = {"epoch": 3, "iter": 18, "CLASSES": ["a", "b"], "hook_msgs": {"last_ckpt": "/somewhere"}, "time": "now"}
    start("export.py", weights(tmp_path, meta=meta, optimizer={"state": torch.ones(3)}), "{place}/out.pth")
    content = torch.load(next(tmp_path.glob("out-*.pth")), weights_only=True)
    assert content.keys() == {"meta", "state_dict"}
    assert {key: content["meta"][key] for key in ("epoch", "iter", "CLASSES")} == {
        "epoch": 3,
        "iter": 18,
        "CLASSES": ["a", "b"],
    }
    assert not content["meta"].keys() & {"hook_msgs", "time", "optimizer"}
    assert capfd.readouterr().out.splitlines()[-1] == str(next(tmp_path.glob("out-*.pth")))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no.pth", "{place}/out.pth"], "checkpoint not found"),
        (["{place}/x.pth", "{place}/out.bin"], "must be named .pth"),
        (["{place}/x.pth", "{place}/no/out.pth"], "there is no folder"),
        (["{place}/x.pth", "{place}/out.pth"], "weights are not in it, or have another shape: rpn_head."),
    ],
)
def test_a_mistake_to_export_is_refused(words: list[str], said: str, start: Callable[..., Any], tmp_path: Path) -> None:
    weights(tmp_path, without="rpn_head")
    with pytest.raises(ConfigError, match=said):
        start("export.py", *words)
    assert not list(tmp_path.glob("out*"))


def test_one_process_exports(start: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start it with python"):
        start("export.py", weights(tmp_path), "{place}/out.pth")
