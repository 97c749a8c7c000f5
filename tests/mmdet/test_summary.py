"""The end of a run is told, whatever the data set is."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agvm_ds.mmdet.hooks.log import ThroughputHook
from agvm_ds.mmdet.summary import summarize
from tests.report.lines import line, written


def test_a_data_set_that_cannot_be_drawn_is_a_warning(
    tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run once ended in this traceback."""
    monkeypatch.setattr(logging.getLogger("agvm_ds"), "propagate", True)
    evaluation: Any = SimpleNamespace(
        latest_metrics={"bbox_mAP": 0.5},
        latest_results=[object()],
        dataloader=SimpleNamespace(dataset=SimpleNamespace(CLASSES=("a",))),
    )
    summarize(tmp_path, evaluation, ThroughputHook(16), 0.0, agvm=False)
    assert "0.500" in capsys.readouterr().out
    assert "no detections to show: SimpleNamespace is not read as CocoDataset is: AttributeError" in caplog.text


def test_a_name_that_looks_like_markup_is_printed_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A module ``[/x]`` once ended a finished run in a traceback, and a folder's name lost what was in brackets."""
    place = tmp_path / "[adamw] lr"
    place.mkdir()
    written(place, line(1).replace("neck", "[/x] heads"))
    summarize(place, None, ThroughputHook(16), 0.0, agvm=True)
    told = "".join(capsys.readouterr().out.split())
    assert "[/x]heads" in told and "[adamw]lr/modules.png" in told
