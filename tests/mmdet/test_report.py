"""The report at the end of a run, from files and objects of every awkward kind."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console, Group

from agvm_ds.mmdet import report

MODULES = ("neck", "backbone", "roi_head.bbox_head")


@pytest.fixture(autouse=True)
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("agvm_ds"), "propagate", True)
    caplog.set_level(logging.WARNING, "agvm_ds")
    return caplog


def line(update: int, **changed: dict[str, Any]) -> str:
    """A measure in which module i has variance 0.1 (i + 1), and what ``changed`` says."""
    modules = {
        name: {"variance": 0.1 * (i + 1), "ratio": 1.0, "scale_factor": 1 + update / 100 * i, "noise_scale": 10.0 * i}
        | {"lr": 0.004}
        | changed.get(name, {})
        for i, name in enumerate(MODULES)
    }
    return json.dumps({"update": update, "samples": 16 * update, "anchor": "backbone", "modules": modules})


def written(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "agvm.jsonl"
    path.write_text("".join(f"{text}\n" for text in lines))
    return path


def printed(group: Group) -> str:
    console = Console(width=100, file=None, record=True, quiet=True)
    console.print(group)
    with console.capture() as capture:
        console.quiet = False
        console.print(group)
    return capture.get()


def row(text: str, start: str) -> list[str]:
    """The last words of the printed line that begins with ``start``."""
    (found,) = [each for each in text.splitlines() if each.strip().startswith(start)]
    return found.strip().removeprefix(start).split()


def test_measures_are_read_as_columns_with_nan_and_infinity(tmp_path: Path) -> None:
    lines = [line(0, neck={"variance": None}), line(10, neck={"noise_scale": "inf"})]
    measures = report.read_measures(written(tmp_path, *lines))
    assert measures is not None
    assert measures.updates == [0, 10]
    assert measures.modules == ["backbone", "neck", "roi_head.bbox_head"]
    assert math.isnan(measures.variance["neck"][0]) and measures.variance["neck"][1] == 0.1
    assert measures.noise_scale["neck"] == [0.0, math.inf]


def test_a_line_cut_off_by_a_kill_is_passed_over(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    measures = report.read_measures(written(tmp_path, line(0), line(10), line(20)[:50]))
    assert measures is not None and measures.updates == [0, 10]
    assert "1 of 3 lines are not measures" in warnings.text


@pytest.mark.parametrize("content", [None, "", "\n", "[1]\n", "3\n", '{"update": 1}\n'])
def test_nothing_to_show_is_a_message_and_no_picture(
    content: str | None, tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "agvm.jsonl"
    if content is not None:
        path.write_text(content)
    assert report.read_measures(path) is None
    assert report.plot_modules(path, tmp_path / "modules.png") is None
    assert not (tmp_path / "modules.png").exists()
    assert "no AGVM measures to show" in warnings.text and str(path) in warnings.text


def test_the_table_has_every_figure(tmp_path: Path) -> None:
    """The table takes the median of the last ten measures, so the twelve before them, far off, must not show."""
    off = {"variance": 1.9, "noise_scale": 5000.0}
    lines = [line(update, neck=off if update < 12 else {}) for update in range(22)]
    measures = report.read_measures(written(tmp_path, *lines))
    text = printed(report.summary_table({"bbox_mAP": 0.7312, "bbox_mAP_50": 0.95}, 141.4, 98.23, measures))
    assert row(text, "0.731") == ["0.950", "2", "min", "21", "s", "98.2"]
    assert row(text, "backbone (anchor)") == ["0.200", "1.210", "10"]
    assert row(text, "neck") == ["0.100", "1.000", "0"]
    assert row(text, "roi_head.bbox_head") == ["0.300", "1.420", "20"]
    assert "last 10 of 22 measures" in text
    assert text.index("backbone") < text.index("neck")


def test_undefined_and_infinite_numbers_are_shown_as_such(tmp_path: Path) -> None:
    changed = {"neck": {"variance": None, "noise_scale": None}, "roi_head.bbox_head": {"noise_scale": "inf"}}
    measures = report.read_measures(written(tmp_path, line(0, **changed)))
    text = printed(report.summary_table({}, 7300.0, 1.0, measures))
    assert row(text, "0.000") == ["0.000", "2", "h", "01", "min", "1.0"]
    assert row(text, "neck") == ["-", "1.000", "-"]
    assert row(text, "roi_head.bbox_head") == ["0.300", "1.000", "∞"]


def test_without_agvm_or_evaluation_the_table_is_the_run_alone() -> None:
    text = printed(report.summary_table(None, 5.0, 3.0, None))
    assert row(text, "not evaluated") == ["0", "min", "05", "s", "3.0"]
    assert "module" not in text


def test_masks_have_their_own_columns() -> None:
    metrics = {"bbox_mAP": 0.7, "bbox_mAP_50": 0.9, "bbox_mAP_s": -1.0, "segm_mAP": 0.6, "segm_mAP_50": 0.8}
    text = printed(report.summary_table(metrics, 5.0, 3.0, None))
    assert "bbox mAP" in text and "segm AP50" in text
    assert row(text, "0.700")[:3] == ["0.900", "0.600", "0.800"]


@pytest.mark.parametrize("count", [1, 2, 300])
def test_the_plot_has_both_panels_and_every_module(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(report, "_save", lambda figure, out: figures.append(figure) or out)
    path = written(tmp_path, *(line(10 * i, neck={"variance": None}) for i in range(count)))
    assert report.plot_modules(path, tmp_path / "modules.png", title="a title") == tmp_path / "modules.png"
    above, below = figures[0].axes
    assert "Φ" in above.get_ylabel() and "μ" in below.get_ylabel() and below.get_xlabel() == "update"
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [
        "backbone (anchor)",
        "neck",
        "roi_head.bbox_head",
    ]
    factors = [each.get_ydata()[-1] for each in below.get_lines()]
    assert factors == [1 + (count - 1) / 10, 1.0, 1 + (count - 1) / 5]
    assert len({(each.get_color(), str(each.get_linestyle())) for each in below.get_lines()}) == 3


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    out = report.plot_modules(written(tmp_path, line(0), line(10)), tmp_path / "new" / "modules.png")
    assert out is not None
    with Image.open(out) as picture:
        assert picture.format == "PNG" and min(picture.size) > 600


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
    sample = report.sample_of(dataset, results(), count=3)
    assert [path.name for path in sample.images] == ["0.png", "2.png", "5.png"]
    assert [int(labels[0]) for _, labels in sample.truths] == [0, 0, 1]
    assert len(report.sample_of(dataset, results(), count=16).images) == 6


def test_a_sample_finds_its_images_in_a_concatenation_of_data_sets(dataset: SimpleNamespace) -> None:
    short = SimpleNamespace(img_prefix="short", data_infos=dataset.data_infos[:2], get_ann_info=dataset.get_ann_info)
    both = SimpleNamespace(datasets=[short, dataset], cumulative_sizes=[2, 8])
    names = [str(path)[-7:] for path in report.sample_of(both, results() + results()[:2]).images]
    assert names[:2] == ["t/0.png", "t/1.png"]
    assert [name[-5:] for name in names[2:]] == [f"{i}.png" for i in range(6)]


@pytest.mark.parametrize("masks", [False, True])
def test_detections_are_drawn_right_or_wrong(
    masks: bool, dataset: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    monkeypatch.setattr(report, "_save", lambda figure, out: figures.append(figure) or out)
    found: list[Any] = [(boxes, [[], []]) for boxes in results()] if masks else results()
    report.draw_detections(report.sample_of(dataset, found), ("cat", "dog"), tmp_path / "x.png")
    cells = [cell for cell in figures[0].axes if cell.images]
    assert len(cells) == 6
    colors = [cell.patches[-1].get_edgecolor() for cell in cells]
    assert colors[0] == colors[2] == colors[4] != colors[1] == colors[3] == colors[5]
    assert {cell.texts[0].get_text() for cell in cells} == {"cat 0.90"}


def test_unsure_detections_are_left_out(dataset: SimpleNamespace, tmp_path: Path) -> None:
    assert report._detections(results(0.49)[0], 0.5) == []
    out = report.draw_detections(report.sample_of(dataset, results(0.49)), ("cat", "dog"), tmp_path / "sheet.png")
    assert out is not None
    with Image.open(out) as picture:
        assert picture.format == "PNG"


def test_no_images_is_a_message(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    assert report.draw_detections(report.Sample([], [], []), ("cat",), tmp_path / "sheet.png") is None
    assert "no detections to show" in warnings.text


def test_what_cannot_be_drawn_is_a_message(
    dataset: SimpleNamespace, tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    proposals = [np.zeros((3, 5))] * 6
    assert report.draw_detections(report.sample_of(dataset, proposals), ("cat",), tmp_path / "sheet.png") is None
    assert "not boxes by class" in warnings.text
    (tmp_path / "0.png").unlink()
    assert report.draw_detections(report.sample_of(dataset, results()), ("cat", "dog"), tmp_path / "s.png") is None
    assert "cannot be read" in warnings.text and "0.png" in warnings.text


def test_iou_of_worked_boxes() -> None:
    a = np.array([0.0, 0, 10, 10])
    assert report._iou(a, np.array([5.0, 0, 15, 10])) == pytest.approx(50 / 150)
    assert report._iou(a, np.array([20.0, 0, 30, 10])) == 0
