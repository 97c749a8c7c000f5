"""Where measures are written: ``agvm.jsonl`` and DeepSpeed's monitor."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agvm_ds.controller import Controller, Measure

FILE_NAME = "agvm.jsonl"


def plain_number(value: float) -> float | str | None:
    """A number as strict JSON has it: null for nan, "inf" for infinity."""
    if math.isnan(value):
        return None
    return "inf" if math.isinf(value) else value


class JsonLines:
    """A listener that appends one line a measured update to ``path``.

    {"update", "samples", "anchor", "modules": {name: {quantity: number}}}: ``samples`` counts images up to and including the
    update, the quantities are those of ``columns_of``, undefined values are null. Lines from ``controller.steps`` on are
    dropped at the start: see ``keep_before``.
    """

    def __init__(self, path: Path, controller: Controller) -> None:
        self.path = path
        self.controller = controller
        keep_before(path, controller.steps)
        path.touch()

    def __call__(self, measure: Measure) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(self._record(measure)) + "\n")

    def _record(self, measure: Measure) -> dict[str, Any]:
        columns = columns_of(measure, self.controller)
        names = self.controller.modules
        modules = {name: {key: plain_number(column[name]) for key, column in columns.items()} for name in names}
        samples = int(self.controller.shards.engine.global_samples)
        return {"update": measure.update, "samples": samples, "anchor": self.controller.anchor, "modules": modules}


def keep_before(path: Path, update: int) -> None:
    """Drop the lines from this update on, which a run has left that went further than its checkpoint; unfinished ones too."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if _update_of(line) < update]
    if kept != lines:
        draft = path.with_suffix(".tmp")
        draft.write_text("".join(f"{line}\n" for line in kept))
        os.replace(draft, path)


def _update_of(line: str) -> float:
    """The update that a line is of; infinity for a line that is no measure."""
    try:
        return int(json.loads(line)["update"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def columns_of(measure: Measure, controller: Controller) -> dict[str, dict[str, float]]:
    """Quantity -> module -> its number in a measured update, nan where undefined.

    ``lr`` is what the module's first group shows, ``effective_lr`` what it stepped with.
    """
    return {
        "variance": measure.variances,
        "ratio": measure.ratios,
        "scale_factor": measure.scale_factors,
        "lr": {name: float(rate) for name, rate in controller.rates.items()},
        "effective_lr": controller.effective_rates,
        "noise_scale": measure.noise_scales,
        "noise": measure.noises,
        "signal": measure.signals,
    }


def deepspeed_events(controller: Controller) -> Callable[[Measure], None]:
    """A listener that hands every defined number to DeepSpeed's monitor, against the samples seen, as DeepSpeed does its own.

    Names: Train/AGVM/<module>/<quantity of columns_of>, and Train/AGVM/update, the number of the update at these samples.
    """

    def write(measure: Measure) -> None:
        engine = controller.shards.engine
        events = [
            (f"Train/AGVM/{name}/{key}", value, engine.global_samples)
            for key, column in columns_of(measure, controller).items()
            for name, value in column.items()
            if math.isfinite(value)
        ]
        engine.monitor.write_events([("Train/AGVM/update", measure.update, engine.global_samples), *events])

    return write
