"""agvm.jsonl as columns."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger("agvm_ds")

QUANTITIES = ("variance", "scale_factor", "noise_scale", "lr", "effective_lr", "noise", "signal")


@dataclass(frozen=True)
class Measures:
    """The lines of one ``agvm.jsonl``, m of them, as columns: name of the module -> m numbers, nan where undefined."""

    anchor: str
    updates: list[int]
    samples: list[float]
    """Images up to and including the update."""
    variance: dict[str, list[float]]
    scale_factor: dict[str, list[float]]
    noise_scale: dict[str, list[float]]
    lr: dict[str, list[float]]
    effective_lr: dict[str, list[float]]
    noise: dict[str, list[float]]
    signal: dict[str, list[float]]

    @property
    def modules(self) -> list[str]:
        """The anchor, then the others in the file's order."""
        return sorted(self.scale_factor, key=lambda name: name != self.anchor)


def read_measures(agvm_jsonl: Path) -> Measures | None:
    """Read ``agvm.jsonl``; None, with a warning, if it is missing or holds no measure. Broken lines are passed over."""
    try:
        lines = agvm_jsonl.read_text().splitlines()
    except OSError as error:
        logger.warning("no AGVM measures to show: %s: %s", agvm_jsonl, error.strerror)
        return None
    records = [record for record in map(_record, lines) if record]
    if len(records) < len(lines):
        logger.warning("%s: %d of %d lines are not measures", agvm_jsonl, len(lines) - len(records), len(lines))
    if not records:
        logger.warning("no AGVM measures to show: %s holds none (no update was measured)", agvm_jsonl)
        return None
    names = list(records[-1]["modules"])
    columns = {
        key: {name: [_number(r["modules"].get(name, {}).get(key)) for r in records] for name in names}
        for key in QUANTITIES
    }
    updates, samples = [int(record["update"]) for record in records], [_number(r.get("samples")) for r in records]
    return Measures(str(records[-1]["anchor"]), updates, samples, **columns)


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        return record if {"update", "anchor", "modules"} <= set(record) else None
    except (ValueError, TypeError):
        return None


def _number(value: float | str | None) -> float:
    return math.nan if value is None else float(value)
