"""What ``launch/train.py`` leaves at the end of a run: a table on the terminal, two pictures in the work dir."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from agvm_ds.mmdet.detections import draw_detections, sample_of
from agvm_ds.mmdet.hooks.evaluation import EngineEvalHook
from agvm_ds.mmdet.hooks.log import ThroughputHook
from agvm_ds.monitor import FILE_NAME
from agvm_ds.report.figures import plot_modules
from agvm_ds.report.measures import read_measures
from agvm_ds.report.table import summary_table

logger = logging.getLogger("agvm_ds")

MODULES_PICTURE = "modules.png"
DETECTIONS_PICTURE = "detections.png"


def summarize(
    work_dir: Path, evaluation: EngineEvalHook | None, clock: ThroughputHook, started: float, agvm: bool
) -> None:
    """Print the table and draw the pictures; rank 0 calls it.

    started: the run's first moment, as ``time.perf_counter`` gives it.
    """
    log = work_dir / FILE_NAME
    metrics = evaluation.latest_metrics if evaluation is not None else None
    table = summary_table(metrics, time.perf_counter() - started, clock.speed, read_measures(log) if agvm else None)
    written: list[Any] = []
    if agvm:
        written.append(plot_modules(log, work_dir / MODULES_PICTURE, work_dir.name))
    if evaluation is not None and evaluation.latest_results is not None:
        written.append(_draw(evaluation.dataloader.dataset, evaluation.latest_results, work_dir / DETECTIONS_PICTURE))
    console = Console(markup=False)
    console.print(table)
    for path in filter(None, written):
        console.print(f"picture: {path}")


def _draw(dataset: Any, results: Any, out: Path) -> Path | None:
    """The sheet of detections; None, with a warning, for a data set that is unlike mmdet's own."""
    try:
        return draw_detections(sample_of(dataset, results), dataset.CLASSES, out)
    except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        kind = type(dataset).__name__
        logger.warning(
            "no detections to show: %s is not read as CocoDataset is: %s: %s", kind, type(error).__name__, error
        )
        return None
