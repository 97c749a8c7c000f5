"""Short trainings of the demo's detector over two ranks, on a little data that it can learn by heart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.trainer import Outcome, cfg_options, data_options, launch, write_config, write_json

BY_HEART = {
    "runner.max_epochs": 48,
    "lr_config.warmup_iters": 8,
    "evaluation.interval": 100,
    "checkpoint_config.interval": 48,
    "log_config.interval": 1,
}
AFTER = {"runner.max_epochs": 1, "lr_config": "None", "optimizer.lr": 1e-4, "evaluation.interval": 1}


def run(
    place: Path, digits: Path, settings: dict[str, Any], options: dict[str, Any], *more: str, config: str = ""
) -> Path:
    """A run that ends well; its work dir."""
    outcome = attempt(place, digits, settings, options, *more, config=config)
    assert outcome.good, outcome.output
    return place / "work"


def attempt(
    place: Path, digits: Path, settings: dict[str, Any], options: dict[str, Any], *more: str, config: str = ""
) -> Outcome:
    named = [str(write_config(place, config)), "--deepspeed_config", str(write_json(place, settings))]
    words = [*named, "--work-dir", str(place / "work"), "--seed", "0", *more]
    return launch("train.py", [*words, *cfg_options({**data_options(digits), **options})], place)


def by_heart(digits: Path) -> dict[str, Any]:
    """Train on the images that are evaluated."""
    files = {"data.train.ann_file": digits / "annotations/val.json", "data.train.img_prefix": digits / "val"}
    return {**BY_HEART, **files}
