"""The end of a run is told, whatever the data set is."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agvm_ds.mmdet.hooks.log import ThroughputHook
from agvm_ds.mmdet.summary import summarize


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
