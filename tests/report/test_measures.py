"""Measures and the table and picture of them, from files of every awkward kind."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console, Group

from agvm_ds.report import figures
from agvm_ds.report.measures import read_measures
from agvm_ds.report.table import summary_table
from tests.report.lines import line, written


@pytest.fixture(autouse=True)
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("agvm_ds"), "propagate", True)
    caplog.set_level(logging.WARNING, "agvm_ds")
    return caplog


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
    measures = read_measures(written(tmp_path, *lines))
    assert measures is not None
    assert measures.updates == [0, 10]
    assert measures.modules == ["backbone", "neck", "roi_head.bbox_head"]
    assert math.isnan(measures.variance["neck"][0]) and measures.variance["neck"][1] == 0.1
    assert measures.noise_scale["neck"] == [0.0, math.inf]


def test_a_line_cut_off_by_a_kill_is_passed_over(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    measures = read_measures(written(tmp_path, line(0), line(10), line(20)[:50]))
    assert measures is not None and measures.updates == [0, 10]
    assert "1 of 3 lines are not measures" in warnings.text


@pytest.mark.parametrize("content", [None, "", "\n", "[1]\n", "3\n", '{"update": 1}\n'])
def test_nothing_to_show_is_a_message_and_no_picture(
    content: str | None, tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "agvm.jsonl"
    if content is not None:
        path.write_text(content)
    assert read_measures(path) is None
    assert figures.plot_modules(path, tmp_path / "modules.png") is None
    assert not (tmp_path / "modules.png").exists()
    assert "no AGVM measures to show" in warnings.text and str(path) in warnings.text


def test_the_table_has_every_figure(tmp_path: Path) -> None:
    """The table takes the median of the last ten measures, so the twelve before them, far off, must not show."""
    off = {"variance": 1.9, "noise_scale": 5000.0}
    lines = [line(update, neck=off if update < 12 else {}) for update in range(22)]
    measures = read_measures(written(tmp_path, *lines))
    text = printed(summary_table({"bbox_mAP": 0.7312, "bbox_mAP_50": 0.95}, 141.4, 98.23, measures))
    assert row(text, "0.731") == ["0.950", "2", "min", "21", "s", "98.2"]
    assert row(text, "backbone (anchor)") == ["0.200", "1.210", "10"]
    assert row(text, "neck") == ["0.100", "1.000", "0"]
    assert row(text, "roi_head.bbox_head") == ["0.300", "1.420", "20"]
    assert "last 10 of 22 measures" in text
    assert text.index("backbone") < text.index("neck")


def test_undefined_and_infinite_numbers_are_shown_as_such(tmp_path: Path) -> None:
    changed = {"neck": {"variance": None, "noise_scale": None}, "roi_head.bbox_head": {"noise_scale": "inf"}}
    measures = read_measures(written(tmp_path, line(0, **changed)))
    text = printed(summary_table({}, 7300.0, 1.0, measures))
    assert row(text, "0.000") == ["0.000", "2", "h", "01", "min", "1.0"]
    assert row(text, "neck") == ["-", "1.000", "-"]
    assert row(text, "roi_head.bbox_head") == ["0.300", "1.000", "∞"]


def test_without_agvm_or_evaluation_the_table_is_the_run_alone() -> None:
    text = printed(summary_table(None, 5.0, 3.0, None))
    assert row(text, "not evaluated") == ["0", "min", "05", "s", "3.0"]
    assert "module" not in text


def test_masks_have_their_own_columns() -> None:
    metrics = {"bbox_mAP": 0.7, "bbox_mAP_50": 0.9, "bbox_mAP_s": -1.0, "segm_mAP": 0.6, "segm_mAP_50": 0.8}
    text = printed(summary_table(metrics, 5.0, 3.0, None))
    assert "bbox mAP" in text and "segm AP50" in text
    assert row(text, "0.700")[:3] == ["0.900", "0.600", "0.800"]


@pytest.mark.parametrize("count", [1, 2, 300])
def test_the_plot_has_both_panels_and_every_module(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "save", lambda figure, out: drawn.append(figure) or out)
    path = written(tmp_path, *(line(10 * i, neck={"variance": None}) for i in range(count)))
    assert figures.plot_modules(path, tmp_path / "modules.png", title="a title") == tmp_path / "modules.png"
    above, below = drawn[0].axes
    assert "Φ" in above.get_ylabel() and "μ" in below.get_ylabel() and below.get_xlabel() == "update"
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == [
        "backbone (anchor)",
        "neck",
        "roi_head.bbox_head",
    ]
    factors = [each.get_ydata()[-1] for each in below.get_lines()]
    assert factors == [1 + (count - 1) / 10, 1.0, 1 + (count - 1) / 5]
    assert len({(each.get_color(), str(each.get_linestyle())) for each in below.get_lines()}) == 3


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    out = figures.plot_modules(written(tmp_path, line(0), line(10)), tmp_path / "new" / "modules.png")
    assert out is not None
    with Image.open(out) as picture:
        assert picture.format == "PNG" and min(picture.size) > 600
