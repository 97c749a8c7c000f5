"""Whether there is room for a run's checkpoints where its work dir is.

A checkpoint is ``epoch_N.pth``, 4 P bytes of P parameters, and DeepSpeed's state of all ranks together: 4 P of weights, and
4 (1 + m) T of the master copy and the optimizer's m states of T trained parameters; stage 3 writes the master copy alone. A
state is written before an older one is removed.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from mmcv import Config

from agvm_ds.mmdet.configs import detector_of
from agvm_ds.mmdet.limits import RUNNERS
from agvm_ds.mmdet.planning.memory import FP32, GIB

STATES = 2
"""m: the most that an optimizer keeps a parameter (Adam); SGD with momentum keeps one."""


@dataclass(frozen=True)
class Checkpoints:
    """What a run has on the disk at most; bytes."""

    number: int
    weights: int
    state: int

    @property
    def total(self) -> int:
        """Of all that are there at once."""
        return self.number * (self.weights + self.state)


def checkpoints_of(cfg: Config, states: int = STATES) -> Checkpoints:
    """The checkpoints of a config's run. Raises ConfigError when its detector cannot be built."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in detector_of(cfg).parameters()]
    every, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    return Checkpoints(_number(cfg), FP32 * every, FP32 * (every + (1 + states) * trained))


def _number(cfg: Config) -> int:
    """How many are there at once: those that stay, and the one that is being written."""
    settings = cfg.get("checkpoint_config") or {}
    interval, most = settings.get("interval", -1), settings.get("max_keep_ckpts", -1)
    length = cfg.runner.get(RUNNERS.get(cfg.runner.type, "")) or 0
    saved = length // interval if interval > 0 else 0
    return min(saved, most + 1) if most > 0 else saved


def too_little_room(cfg: Config, work_dir: Path) -> str | None:
    """What to say when the checkpoints may not fit where ``work_dir``, which need not be there yet, is; None when they do."""
    needed = checkpoints_of(cfg)
    place = next(folder for folder in (work_dir.absolute(), *work_dir.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if needed.total <= free:
        return None
    return (
        f"--work-dir {work_dir}: {free / GIB:.1f} GiB are free, and the run's checkpoints take up to "
        f"{needed.total / GIB:.1f}: {needed.number} x ({needed.weights / GIB:.2f} of weights + {needed.state / GIB:.2f} of "
        "DeepSpeed's state); launch/train.py --keep N keeps N of them"
    )
