"""One run of the study: launch/train.py on one rank, and the line that it leaves."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from agvm_ds.demo.data import ensure
from agvm_ds.monitor import plain_number
from benchmarks.machine import describe
from benchmarks.study.plan import DIVERGED, DONE, FAILED, Line
from benchmarks.study.protocol import (
    ALONE,
    CHOOSING_SEED,
    IMAGES,
    MICRO,
    OPTIMIZERS,
    SET,
    STEPS,
    WARM_UP,
    Run,
    agvm_block,
)
from tests.launch import launch_port

ROOT = Path(__file__).parents[2]
DATA = ROOT / "data/study"
DETECTORS = {norm: Path(__file__).with_name(name) for norm, name in (("BN", "detector.py"), ("GN", "detector_gn.py"))}
"""By the backbone's normalization."""
POINTS = 4
"""Evaluations in a run."""
BINS = 16
"""Parts of a run over which measures are averaged for its line."""
QUANTITIES = ("variance", "ratio", "scale_factor", "noise", "signal")
"""Of a module, in agvm.jsonl."""
SETS = {"choose": "0_bbox_mAP", "report": "1_bbox_mAP"}
"""Validation set -> its metric, as mmdet's ConcatDataset calls it."""
TIMM = {"imports": ["benchmarks.study.optimizers"], "allow_failed_imports": False}
NOT_FINITE = "is not finite"
"""What launch/train.py says of a run that diverged."""


STOPPED = (-signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL, 130, 143)
"""Exit codes of a training that somebody ended."""


class NotRun(RuntimeError):
    """A run has no end yet: another process trains it, or it was stopped; it goes on the next time."""


def make_data(folder: Path = DATA) -> None:
    """The data set, and its validation images as two sets: the first half to choose by, the second to report."""
    root = ensure(folder / "digits", train=IMAGES, val=2 * SET)
    whole = json.loads((root / "annotations/val.json").read_text())
    for name, part in zip(SETS, (slice(0, SET), slice(SET, None)), strict=True):
        images = whole["images"][part]
        kept = {image["id"] for image in images}
        notes = [note for note in whole["annotations"] if note["image_id"] in kept]
        draft = folder / f".{name}.{os.getpid()}"
        draft.write_text(json.dumps({**whole, "images": images, "annotations": notes}))
        draft.replace(folder / f"{name}.json")


def mmdet_settings(run: Run) -> dict[str, Any]:
    """What the run's mmdet config has over its detector's."""
    optimizer = {**OPTIMIZERS[run.base], "lr": run.rate}
    if run.multipliers:
        optimizer["paramwise_cfg"] = {"custom_keys": {name: {"lr_mult": mu} for name, mu in run.multipliers.items()}}
    return {
        "optimizer": optimizer,
        "lr_config": {
            "policy": "step",
            "by_epoch": False,
            "step": [round(share * run.updates) for share in STEPS],
            "warmup": "exp",
            "warmup_iters": round(WARM_UP * run.updates),
            "warmup_ratio": 0.001,
        },
        "runner": {"type": "EpochBasedRunner", "max_epochs": run.epochs},
        "evaluation": {"interval": max(run.epochs // POINTS, 1), "metric": "bbox"},
        "checkpoint_config": {"interval": 1, "max_keep_ckpts": run.epochs},
        "log_config": {"interval": max(run.updates // 64, 1), "hooks": [{"type": "TextLoggerHook"}]},
    }


def deepspeed_settings(run: Run) -> dict[str, Any]:
    """The run's DeepSpeed JSON; clipping is the demo's, and the same for all."""
    return {
        "train_batch_size": run.batch,
        "train_micro_batch_size_per_gpu": MICRO,
        "zero_optimization": {"stage": 0},
        "gradient_clipping": 10.0,
        "agvm": agvm_block(run),
    }


def train(run: Run, folder: Path, commit: str) -> Line:
    """Train a run in ``folder / run.key``, going on where an interrupted one ended, and return its line.

    A run that was done leaves its log and agvm.jsonl; one that failed, also its checkpoints. Raises NotRun.
    """
    place = folder / run.key
    place.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with _alone(place) as lock:
        code, output = _launch(run, place, lock)
    if code in STOPPED:
        raise NotRun(f"{run.key} was stopped")
    status = DONE if code == 0 else DIVERGED if NOT_FINITE in output else FAILED
    line: dict[str, Any] = {
        "key": run.key,
        "status": status,
        "run": run.record(),
        "updates": run.updates,
        "mmdet": mmdet_settings(run),
        "deepspeed": deepspeed_settings(run),
        "commit": commit,
        "machine": describe()["machine"],
        "seconds": round(time.monotonic() - began),
    }
    if status == FAILED:
        return {**line, "reason": output[-2000:]}
    if status == DIVERGED:
        line["reason"] = " ".join(output[output.rindex("error: ") :].split())[:500]
    shutil.rmtree(place / "work/deepspeed", ignore_errors=True)
    if not keeps_weights(run):
        for weights in (place / "work").glob("epoch_*.pth"):
            weights.unlink()
    return {**line, **results(place / "work", run)}


def keeps_weights(run: Run) -> bool:
    """Whether each epoch's weights stay: those that the comparison of the estimators begins from."""
    return (run.method, run.seed) == ("plain", CHOOSING_SEED)


@contextmanager
def _alone(place: Path) -> Iterator[int]:
    """Nobody else trains here: a lock that the training holds too, should this process be killed."""
    with (place / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NotRun(f"{place.name} is trained by another process") from None
        yield lock.fileno()


def _launch(run: Run, place: Path, lock: int) -> tuple[int, str]:
    """(exit code, what it said) of the training, one thread on one rank, which is started as Slurm would start it."""
    (place / "config.json").write_text(json.dumps(config(run)))
    (place / "ds.json").write_text(json.dumps(deepspeed_settings(run)))
    words = [
        str(place / "config.json"),
        "--deepspeed_config",
        str(place / "ds.json"),
        "--work-dir",
        str(place / "work"),
    ]
    if any((place / "work").glob("deepspeed/*/")):
        words.append("--resume")
    with launch_port() as port, (place / "output").open("a+") as output:
        environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
        output.seek(0, os.SEEK_END)
        begin = output.tell()
        code = subprocess.run(
            [sys.executable, "launch/train.py", *words, "--seed", str(run.seed)],
            cwd=ROOT,
            env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[lock],
            check=False,
        ).returncode
        output.seek(begin)
        return code, output.read()


def config(run: Run) -> dict[str, Any]:
    """The run's mmdet config file."""
    own = {key: _whole(value) for key, value in mmdet_settings(run).items()}
    return {"_base_": str(DETECTORS[run.norm]), **own, **({"custom_imports": TIMM} if run.base in ALONE else {})}


def _whole(value: Any) -> Any:
    """A block in the place of the base's, not merged with it."""
    return {"_delete_": True, **value} if isinstance(value, Mapping) else value


def results(work_dir: Path, run: Run) -> dict[str, Any]:
    """mAP on both sets (0 for a run without an evaluation at its end), the curve, and the measures in BINS parts."""
    logs = [json.loads(line) for log in sorted(work_dir.glob("*.log.json")) for line in log.read_text().splitlines()]
    train = {line["iter"] + _before(line, run): line["loss"] for line in logs if line.get("mode") == "train"}
    points = {line["update"]: line for line in logs if line.get("mode") == "val"}
    curve = [
        {"update": update, **{name: line[key] for name, key in SETS.items()}} for update, line in sorted(points.items())
    ]
    ended = curve[-1] if curve and curve[-1]["update"] == run.updates else dict.fromkeys(SETS, 0.0)
    measures = [json.loads(line) for line in (work_dir / "agvm.jsonl").read_text().splitlines()]
    return {
        **{name: ended[name] for name in SETS},
        "curve": curve,
        "loss": [[update, loss] for update, loss in sorted(train.items())],
        "measures": in_bins(measures, run.updates),
        "mean_scale_factors": mean_factors(measures),
    }


def _before(line: Line, run: Run) -> int:
    """Updates of the epochs before a log line's."""
    return (int(line["epoch"]) - 1) * run.updates // run.epochs


def in_bins(measures: Sequence[Line], updates: int) -> dict[str, dict[str, list[float | str | None]]]:
    """module -> quantity -> its mean over the measures of each of BINS parts of the run, or null."""
    parts: list[list[Line]] = [[] for _ in range(BINS)]
    for measure in measures:
        parts[measure["update"] * BINS // updates].append(measure["modules"])
    names = list(measures[0]["modules"]) if measures else []
    return {name: {key: [_mean(part, name, key) for part in parts] for key in QUANTITIES} for name in names}


def _mean(part: Sequence[Line], name: str, key: str) -> float | str | None:
    values = [float(measure[name][key]) for measure in part if measure[name][key] is not None]
    if not values:
        return None
    return plain_number(float(f"{fmean(values):.5g}"))


def mean_factors(measures: Sequence[Line]) -> dict[str, float]:
    """module -> mean scale factor over the measures."""
    names = list(measures[0]["modules"]) if measures else []
    return {name: round(fmean(measure["modules"][name]["scale_factor"] for measure in measures), 4) for name in names}
