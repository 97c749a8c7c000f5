"""A short run of the demo's detector, the command line for it with a fault in it, and what another run ends without."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.trainer import Outcome, cfg_options, data_options, launch, write_config, write_json

SETTINGS = {
    "train_batch_size": 8,
    "zero_optimization": {"stage": 2},
    "agvm": {"interval": 2, "ema_decay": 0.5, "start_step": 1},
}
OPTIONS = {
    "runner.max_epochs": 3,
    "lr_config.warmup_iters": 8,
    "log_config.interval": 1,
    "evaluation.interval": 1,
    "checkpoint_config.interval": 1,
    "data.samples_per_gpu": 2,
    "data.workers_per_gpu": 1,
}
"""Three epochs of six updates of two accumulation steps; warm-up ends, and the rate falls, on the way."""
EPOCH = 6


@dataclass
class Runs:
    """One place for the runs of this module, and the run that nothing happened to."""

    place: Path
    digits: Path

    def words(self, work: Path, fault: str, *more: str, seed: int | None = 0, **settings: Any) -> list[str]:
        """Of launch/train.py. settings: of the DeepSpeed JSON, in the place of SETTINGS."""
        place = self.place / f"{work.name}_in"
        json_file = write_json(place, {**SETTINGS, **settings})
        named = [str(write_config(place, fault)), "--deepspeed_config", str(json_file)]
        named += ["--work-dir", str(work), *more]
        named += [] if seed is None else ["--seed", str(seed)]
        return [*named, *cfg_options({**data_options(self.digits), **OPTIONS})]

    def go(self, work: Path, fault: str = "", *more: str, ranks: int = 2, **options: Any) -> Outcome:
        return launch("train.py", self.words(work, fault, *more, **options), self.place / f"{work.name}_in", ranks)

    def resume(self, work: Path, *more: str, **options: Any) -> Outcome:
        return self.go(work, "", "--resume", *more, **options)

    def lost(self, work: Path, whole: str = "whole") -> str:
        """What the run in ``work`` ends without, compared with the one that went through."""
        missing = [what for what, same in compared(self.place / whole, work).items() if not same]
        return ", ".join(missing) or "nothing"


def compared(one: Path, other: Path) -> dict[str, bool]:
    weights = [torch.load(work / "latest.pth", weights_only=True)["state_dict"] for work in (one, other)]
    measures = [(work / "agvm.jsonl").read_text() for work in (one, other)]
    scores = [_scores(work) for work in (one, other)]
    return {
        "weights": all(torch.equal(value, weights[1][name]) for name, value in weights[0].items()),
        "scale factors": measures[0] == measures[1],
        "evaluations": scores[0] == scores[1],
        "published epochs": published(one) == published(other),
    }


def published(work: Path) -> list[str]:
    return sorted(path.name for path in work.glob("epoch_*.pth"))


def _scores(work: Path) -> dict[int, float]:
    """epoch -> mAP, over all the logs of a work dir."""
    lines = [json.loads(line) for log in sorted(work.glob("*.log.json")) for line in log.read_text().splitlines()]
    return {line["epoch"]: line["bbox_mAP"] for line in lines if line.get("mode") == "val"}
