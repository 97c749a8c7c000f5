"""A shrunk run: two updates on two ranks by launch/train.py, on the built-in digits as COCO's, and what came of it."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.datasets import CocoDataset
from PIL import Image, ImageDraw

from agvm_ds.demo.data import ensure
from tests.trainer import launch

RANKS, UPDATES, MICRO = 2, 2, 2
WORK_DIR = "work"
"""Of a run, in its place."""


def make_data(folder: Path) -> Path:
    """The digits as COCO data with its 80 classes, and semantic maps: a digit's label in its outline, else a stuff's."""
    ensure(folder / "digits", train=RANKS * MICRO * UPDATES, val=1)
    content = json.loads((folder / "digits/annotations/train.json").read_text())
    content["categories"] = [{"id": index + 1, "name": name} for index, name in enumerate(CocoDataset.CLASSES)]
    (folder / "train.json").write_text(json.dumps(content))
    (folder / "semantic").mkdir(exist_ok=True)
    for image in content["images"]:
        map_ = Image.new("L", (image["width"], image["height"]), len(CocoDataset.CLASSES))
        for note in content["annotations"]:
            for polygon in note["segmentation"] if note["image_id"] == image["id"] else []:
                ImageDraw.Draw(map_).polygon(np.reshape(polygon, -1).tolist(), fill=note["category_id"] - 1)
        map_.save(folder / "semantic" / image["file_name"])
    return folder


@dataclass(frozen=True)
class Run:
    """A shrunk run."""

    losses: list[float]
    """One an update."""
    variances: dict[str, float]
    """Module -> gradient variance, of the last measured update."""
    seconds: float = 0.0
    reason: str = ""
    """Why it did not train or measure; empty when it did."""

    @classmethod
    def of(cls, work_dir: Path) -> Run:
        """What its log and agvm.jsonl say."""
        lines = [line for log in work_dir.glob("*.log.json") for line in _lines(log)]
        measured = list(_lines(work_dir / "agvm.jsonl")) if (work_dir / "agvm.jsonl").exists() else []
        modules = measured[-1]["modules"] if measured else {}
        losses = [line["loss"] for line in lines if line.get("mode") == "train"]
        return cls(losses, {name: values["variance"] for name, values in modules.items()})


def trained(words: Sequence[str], place: Path, agvm: bool, timeout: float = 600) -> Run:
    """Launch train.py with this command line, whose work dir is ``place / WORK_DIR``, AGVM on or off; timeout: seconds."""
    began = time.monotonic()
    outcome = launch("train.py", words, place, RANKS, timeout=timeout)
    seconds = time.monotonic() - began
    run = Run.of(place / WORK_DIR)
    return replace(run, seconds=seconds, reason=problem_of(run, agvm) if outcome.good else told(outcome.output))


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, file.read_text().splitlines())


def problem_of(run: Run, agvm: bool) -> str:
    """What is wrong with a shrunk run that ended well, with AGVM or without; empty when nothing is."""
    if len(run.losses) != UPDATES:
        return f"{len(run.losses)} updates, not {UPDATES}"
    if not all(map(math.isfinite, run.losses)):
        return f"losses {run.losses}"
    missing = [name for name, variance in run.variances.items() if variance is None or not math.isfinite(variance)]
    if missing or bool(run.variances) != agvm:
        return f"no variance of {', '.join(missing) or 'any module'}"
    return ""


def told(output: str) -> str:
    """The lines of a launch that failed that say why, as near as can be: its own message, or the last of a traceback."""
    found = re.findall(r"^error: .*(?:\n  .*)*", output, re.MULTILINE) or re.findall(
        r"^\w*Error: .*", output, re.MULTILINE
    )
    return " ".join((found[-1] if found else output[-200:]).split()) or "no output"
