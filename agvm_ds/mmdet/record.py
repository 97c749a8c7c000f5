"""What a run leaves about itself in its work dir: what it really did, and with which command."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from mmcv import Config

from agvm_ds.mmdet.detector.modules import modules_of
from agvm_ds.mmdet.plan import Plan
from agvm_ds.report.runs import CONFIG_FILE, JSON_FILE, LOG, RUN_FILE


def write_record(cfg: Config, plan: Plan, runner: Any, updates: int, resumed: bool) -> None:
    """``config.py`` (mmdet) and ``deepspeed.json``, both as effective, and ``run.json``; rank 0 does it.

    run.json: {"command", "config", "started", "seed", "batch", "micro_batch", "accumulation", "ranks", "updates",
    "updates_per_epoch" (null without epochs), "logs" (names without their endings; a resumed run has several)}.
    """
    if runner.rank != 0:
        return
    work_dir = Path(runner.work_dir)
    (work_dir / JSON_FILE).write_text(json.dumps(effective_json(plan, runner.engine), indent=2) + "\n")
    (work_dir / CONFIG_FILE).write_text(runner.meta["config"], encoding="utf-8")
    record = {
        "command": command(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "seed": cfg.get("seed"),
        "batch": plan.batch.train,
        "micro_batch": plan.batch.micro,
        "accumulation": plan.batch.accumulation,
        "ranks": plan.batch.ranks,
        "updates": updates,
        "updates_per_epoch": runner.updates_per_epoch,
        "logs": [*(_earlier_logs(work_dir) if resumed else []), runner.timestamp],
    }
    (work_dir / RUN_FILE).write_text(json.dumps(record, indent=2) + "\n")


def _earlier_logs(work_dir: Path) -> list[str]:
    """Of the run that is resumed; all that are there when nothing tells."""
    try:
        return list(json.loads((work_dir / RUN_FILE).read_text())["logs"])
    except (OSError, ValueError, LookupError, TypeError):
        return sorted(file.name.removesuffix(LOG) for file in work_dir.glob(f"*{LOG}"))


def effective_json(plan: Plan, engine: Any) -> dict[str, Any]:
    """The DeepSpeed JSON with all keys of the ``agvm`` block."""
    effective = dict(plan.deepspeed)
    if engine.agvm is not None:
        modules = engine.agvm.config.modules or modules_of(engine.module)
        effective["agvm"] = {**engine.agvm.config.model_dump(mode="json"), "modules": modules}
    return effective


def command() -> str:
    """As it would be typed; how many hosts the launcher was told is not known here, and the ranks are in run.json."""
    words = [word for word in sys.argv if not word.startswith("--local_rank")]
    script = os.path.relpath(words[0]) if words else ""
    return shlex.join(["deepspeed", script, *words[1:]])
