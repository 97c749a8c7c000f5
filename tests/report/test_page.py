"""A report of work dirs made by hand: what is read of them, and what the page holds."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from agvm_ds.config import ConfigError
from agvm_ds.report.page import write_page
from agvm_ds.report.pictures import pictures
from agvm_ds.report.runs import Run, read_run, read_runs
from tests.report.lines import line, written

RECORD = {
    "command": "deepspeed launch/train.py --work-dir <W> & more",
    "started": "2026-01-01 00:00:00",
    "seed": 0,
    "batch": 16,
    "micro_batch": 4,
    "accumulation": 2,
    "ranks": 2,
    "updates": 40,
    "updates_per_epoch": 20,
}


def work_dir(place: Path, measures: int = 30, **block: Any) -> Path:
    """Of a run of two epochs; its log was begun again after update 30, which a killed run had left at 32."""
    place.mkdir(parents=True)
    (place / "run.json").write_text(json.dumps(RECORD))
    agvm = {"agvm": {"enabled": True, "estimator": "pairwise", "interval": 1, **block}} if measures else {}
    (place / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, **agvm}))
    (place / "config.py").write_text("optimizer = dict(type='AdamW', lr=0.01)\nmodel = '<b>'\n")
    train = [log_line(update) for update in (8, 16, 24, 32)]
    val = json.dumps(
        {"mode": "val", "epoch": 1, "iter": 5, "lr": 0.01, "update": 20, "bbox_mAP": 0.25, "bbox_mAP_50": 0.5}
    )
    (place / "20260101_000000.log.json").write_text(
        "\n".join(["{}", train[0], train[1], val, *train[2:], train[0][:20]])
    )
    again = [log_line(update, 1.0) for update in (32, 40)]
    last = val.replace("20", "40").replace("0.25", "0.75")
    (place / "20260101_000100.log.json").write_text("\n".join([*again, last]) + "\n")
    if measures:
        written(place, *(line(update) for update in range(measures)))
    return place


def log_line(update: int, loss: float = 2.0) -> str:
    epoch = (update - 1) // 20
    return json.dumps(
        {"mode": "train", "epoch": epoch + 1, "iter": update - 20 * epoch, "lr": 0.01, "loss": loss, "images/s": update}
    )


class Page(HTMLParser):
    """Its text, and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def test_a_run_is_read_with_its_resumes(tmp_path: Path) -> None:
    run = read_run(work_dir(tmp_path / "W"))
    assert run.curve("loss") == ([8, 16, 24, 32, 40], [2.0, 2.0, 2.0, 1.0, 1.0])
    assert run.metric == "bbox_mAP"
    assert run.curve("bbox_mAP", "val") == ([20, 40], [0.25, 0.75])
    assert run.measures is not None and len(run.measures.updates) == 30
    words = run.words()
    assert words["last score"] == "0.750 bbox_mAP" and words["updates"] == "40 of 40"
    assert (words["optimizer"], words["AGVM"], words["images/s"]) == ("AdamW", "pairwise, every 1", "24.0")
    assert read_run(work_dir(tmp_path / "watching", modulate=False)).words()["AGVM"] == "pairwise, every 1, watching"
    assert read_run(work_dir(tmp_path / "plain", measures=0)).words()["AGVM"] == "off"


def test_the_page_holds_everything_and_fetches_nothing(tmp_path: Path) -> None:
    runs = [read_run(work_dir(tmp_path / "one")), read_run(work_dir(tmp_path / "plain", measures=0))]
    page = Page(write_page(runs, tmp_path / "report", "Made by hand.").read_text())
    assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)
    for words in (
        "Made by hand.",
        "0.750 bbox_mAP",
        RECORD["command"],
        "model = '<b>'",
        "No advice: nothing was measured",
        "15 measures at batch 16",
        "Gradient variance by module",
    ):
        assert str(words) in page.text
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {
        "index.html",
        *(
            f"{name}.png"
            for name in ("loss", "score", "throughput", "variance", "scale_factor", "effective_lr", "noise_scale")
        ),
    }
    for path in (tmp_path / "report").glob("*.png"):
        with Image.open(path) as picture:
            assert picture.format == "PNG" and min(picture.size) > 400


def test_a_run_without_agvm_alone_has_its_curves(tmp_path: Path) -> None:
    write_page([read_run(work_dir(tmp_path / "plain", measures=0))], tmp_path / "report", "")
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} == {"loss", "score", "throughput"}


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    place = work_dir(tmp_path / "W", measures=1)
    for log in place.glob("*.log.json"):
        log.unlink()
    run = read_run(place)
    assert run.words()["last loss"] == "-" and run.metric is None
    page = Page(write_page([run], tmp_path / "report", "").read_text())
    assert "1 measures in the last 50% of the run; at least 10 are needed" in page.text


def test_an_earlier_runs_log_in_the_folder_is_no_part_of_a_run(tmp_path: Path) -> None:
    place = work_dir(tmp_path / "W", measures=0)
    (place / "run.json").write_text(json.dumps({**RECORD, "logs": ["20260101_000100"]}))
    assert read_run(place).curve("loss") == ([32, 40], [1.0, 1.0])


def test_a_run_has_made_the_updates_of_its_last_word(tmp_path: Path) -> None:
    """mmcv logs no interval that an epoch cuts off."""
    place = work_dir(tmp_path / "W", measures=36)
    (place / "20260101_000000.log.json").write_text(log_line(8))
    (place / "20260101_000100.log.json").unlink()
    assert read_run(place).words()["updates"] == "36 of 40"
    (place / "deepspeed/epoch_2").mkdir(parents=True)
    (place / "deepspeed/latest").write_text("epoch_2")
    (place / "deepspeed/epoch_2/manifest.json").write_text('{"update": 40}')
    assert read_run(place).words()["updates"] == "40 of 40"
    (place / "deepspeed/epoch_2/manifest.json").write_text("[]")
    assert read_run(place).words()["updates"] == "36 of 40"


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    first, second, third = (work_dir(tmp_path / name, measures=0) for name in ("a/work", "b/work", "b/other"))
    assert [run.name for run in read_runs([first, third])] == ["work", "other"]
    assert [run.name for run in read_runs([first, second, third])] == ["a/work", "b/work", "b/other"]
    assert [run.name for run in read_runs([first, first / ".." / "work"])] == ["work", "work"], "one run, twice"


def test_long_names_stay_in_the_picture(tmp_path: Path) -> None:
    run = read_run(work_dir(tmp_path / "W", measures=0))
    figure = next(pictures([replace(run, name=f"{number}/" + "long" * 12) for number in range(5)])).figure
    FigureCanvasAgg(figure).draw()
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0 and legend.x1 <= figure.bbox.x1


def test_what_is_no_work_dir_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"not a work dir of launch/train.py: run.json, deepspeed.json, config.py not there"
    ):
        read_run(tmp_path)


@pytest.mark.parametrize(("name", "content"), [("run.json", '{"seed": 0'), ("deepspeed.json", "[]")])
def test_a_damaged_work_dir_is_told(name: str, content: str, tmp_path: Path) -> None:
    place = work_dir(tmp_path / "W")
    (place / name).write_text(content)
    with pytest.raises(ConfigError, match=rf"{name}: not as launch/train.py wrote it: "):
        read_run(place)


def test_runs_without_epochs_count_updates(tmp_path: Path) -> None:
    place = work_dir(tmp_path / "W")
    (place / "run.json").write_text(json.dumps({**RECORD, "updates_per_epoch": None}))
    run: Run = read_run(place)
    assert run.curve("loss")[0] == [4, 8, 12, 16, 20]
