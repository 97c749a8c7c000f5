"""Detections drawn at the end of a run, from objects of every awkward kind."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agvm_ds.mmdet import detections


@pytest.fixture(autouse=True)
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("agvm_ds"), "propagate", True)
    caplog.set_level(logging.WARNING, "agvm_ds")
    return caplog


@pytest.fixture
def dataset(tmp_path: Path) -> SimpleNamespace:
    """Six grey images, image i with one true box of class i % 2; the attributes that mmdet's data sets have."""
    for i in range(6):
        Image.fromarray(np.full((40, 60, 3), 100, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    truth = [{"bboxes": np.array([[10.0, 10, 30, 30]]), "labels": np.array([i % 2])} for i in range(6)]
    return SimpleNamespace(
        img_prefix=str(tmp_path),
        data_infos=[{"filename": f"{i}.png"} for i in range(6)],
        get_ann_info=truth.__getitem__,
    )


def results(score: float = 0.9) -> list[list[np.ndarray]]:
    """In each image, a detection of class 0 on the true box; none of class 1."""
    return [[np.array([[11, 11, 30, 30, score]]), np.zeros((0, 5))] for _ in range(6)]


def test_a_sample_is_spread_evenly_over_the_data_set(dataset: SimpleNamespace) -> None:
    sample = detections.sample_of(dataset, results(), count=3)
    assert [path.name for path in sample.images] == ["0.png", "2.png", "5.png"]
    assert [int(labels[0]) for _, labels in sample.truths] == [0, 0, 1]
    assert len(detections.sample_of(dataset, results(), count=16).images) == 6


def test_a_sample_finds_its_images_in_a_concatenation_of_data_sets(dataset: SimpleNamespace) -> None:
    short = SimpleNamespace(img_prefix="short", data_infos=dataset.data_infos[:2], get_ann_info=dataset.get_ann_info)
    both = SimpleNamespace(datasets=[short, dataset], cumulative_sizes=[2, 8])
    names = [str(path)[-7:] for path in detections.sample_of(both, results() + results()[:2]).images]
    assert names[:2] == ["t/0.png", "t/1.png"]
    assert [name[-5:] for name in names[2:]] == [f"{i}.png" for i in range(6)]


@pytest.mark.parametrize("masks", [False, True])
def test_detections_are_drawn_right_or_wrong(
    masks: bool, dataset: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    monkeypatch.setattr(detections, "save", lambda figure, out: figures.append(figure) or out)
    found: list[Any] = [(boxes, [[], []]) for boxes in results()] if masks else results()
    detections.draw_detections(detections.sample_of(dataset, found), ("cat", "dog"), tmp_path / "x.png")
    cells = [cell for cell in figures[0].axes if cell.images]
    assert len(cells) == 6
    colors = [cell.patches[-1].get_edgecolor() for cell in cells]
    assert colors[0] == colors[2] == colors[4] != colors[1] == colors[3] == colors[5]
    assert {cell.texts[0].get_text() for cell in cells} == {"cat 0.90"}


def test_unsure_detections_are_left_out(dataset: SimpleNamespace, tmp_path: Path) -> None:
    assert detections._detections(results(0.49)[0], 0.5) == []
    out = detections.draw_detections(
        detections.sample_of(dataset, results(0.49)), ("cat", "dog"), tmp_path / "sheet.png"
    )
    assert out is not None
    with Image.open(out) as picture:
        assert picture.format == "PNG"


def test_no_images_is_a_message(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    assert detections.draw_detections(detections.Sample([], [], []), ("cat",), tmp_path / "sheet.png") is None
    assert "no detections to show" in warnings.text


def test_what_cannot_be_drawn_is_a_message(
    dataset: SimpleNamespace, tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    proposals = [np.zeros((3, 5))] * 6
    assert (
        detections.draw_detections(detections.sample_of(dataset, proposals), ("cat",), tmp_path / "sheet.png") is None
    )
    assert "not boxes by class" in warnings.text
    (tmp_path / "0.png").unlink()
    assert (
        detections.draw_detections(detections.sample_of(dataset, results()), ("cat", "dog"), tmp_path / "s.png") is None
    )
    assert "cannot be read" in warnings.text and "0.png" in warnings.text


def test_iou_of_worked_boxes() -> None:
    a = np.array([0.0, 0, 10, 10])
    assert detections._iou(a, np.array([5.0, 0, 15, 10])) == pytest.approx(50 / 150)
    assert detections._iou(a, np.array([20.0, 0, 30, 10])) == 0
