"""An mmcv hook that notes of each update of a run when it began and ended, and where its time went; not for a GPU.

Put into a run by its config: ``custom_imports`` of this module, and ``dict(type="TrainerClock", file=...)`` among the
``custom_hooks``. It serves mmdet's own trainer and this project's; rank 0 writes a line of JSON an update.
"""

from __future__ import annotations

import functools
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from mmcv.runner import HOOKS, Hook
from torch import distributed

from agvm_ds.checkpoints import vault
from agvm_ds.mmdet import checkpointing, runner
from agvm_ds.mmdet.detector import model, overflow

ALONE = 200
"""Calls of ``stop_asked`` in a row that are timed before the first update."""

FORWARD, LOSSES, BACKWARD, REDUCTION, STEP = "forward", "losses, shared by the ranks", "backward", "reduction", "step"
DATA, DEVICE, CHECKS, STOP, AGVM, HOOKS_OF_RUN, REST = "data", "to device", "checks", "stop", "AGVM", "hooks", "rest"
ENGINE = "engine"
STATE, STATE_FILES, DIGESTS, DISK, WEIGHTS, RESUME, LOAD = (
    "state: gathered, named, pruned",
    "state: DeepSpeed's files",
    "digests",
    "wait for the disk",
    "weights: epoch_N.pth",
    "resume: rest",
    "resume: DeepSpeed's load",
)


class Stopwatch:
    """Seconds by phase; what is timed within another phase counts for itself alone."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._within = [0.0]

    @property
    def outermost(self) -> float:
        """Seconds in phases since the last ``restart``."""
        return self._within[0]

    def restart(self) -> None:
        """Nothing is spent yet."""
        self.spent.clear()
        self._within = [0.0]

    def add(self, phase: str, seconds: float) -> None:
        """Time that was measured elsewhere, and holds no other phase."""
        self.spent[phase] += seconds
        self._within[-1] += seconds

    def timed(self, owner: Any, names: str, phase: str) -> None:
        """Time every call of these functions of ``owner`` from now on."""
        for name in names.split():
            setattr(owner, name, self._timed(getattr(owner, name), phase))

    def _timed(self, function: Any, phase: str) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._within.append(0.0)
            start = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.monotonic() - start
                self.spent[phase] += whole - self._within.pop()
                self._within[-1] += whole

        return call


@HOOKS.register_module()
class TrainerClock(Hook):
    """See the module. An update lasts from the end of the one before, so it begins with its data."""

    def __init__(self, file: str) -> None:
        self._file = Path(file)
        self._watch = Stopwatch()
        self._since = self._cpu = 0.0
        self._first = True
        self._checkpoints()

    def before_run(self, runner: Any) -> None:
        """Begin; a resume is over then."""
        engine: Any = getattr(runner.model, "engine", None)
        self._write({"before": dict(self._watch.spent)})
        if hasattr(runner, "watch"):
            self._write({"stop_asked": _alone(runner.watch, engine.device)})
            self._ours(runner)
        self._trainer(runner)
        if engine is None:
            self._mmdets(runner)
        else:
            self._deepspeeds(engine)
        self._watch.timed(runner, "call_hook", HOOKS_OF_RUN)
        runner.call_hook = self._noting(runner, runner.call_hook)
        self._watch.restart()
        self._since, self._cpu = time.monotonic(), time.process_time()

    def before_train_epoch(self, runner: Any) -> None:
        """Its first update also makes an iterator, and mmcv's runner sleeps."""
        self._first = True

    def _noting(self, runner: Any, call_hook: Any) -> Any:
        def call(name: str) -> None:
            if name == "before_train_iter":
                self._watch.add(DATA, time.monotonic() - self._since - self._watch.outermost)
            call_hook(name)
            if name == "after_train_iter":
                self._end(runner)

        return call

    def _end(self, runner: Any) -> None:
        now, cpu, spent = time.monotonic(), time.process_time(), dict(self._watch.spent)
        update = {
            "start": self._since,
            "end": now,
            "cpu": cpu - self._cpu,
            "first": self._first,
            "loss": runner.outputs["log_vars"]["loss"],
            "spent": {**spent, REST: now - self._since - self._watch.outermost},
        }
        self._write(update)
        self._watch.restart()
        self._first = False
        self._since, self._cpu = now, cpu

    def _write(self, line: dict[str, Any]) -> None:
        if distributed.get_rank() == 0:
            with self._file.open("a") as file:
                file.write(json.dumps(line) + "\n")

    # What is timed

    def _trainer(self, runner: Any) -> None:
        timed, detector = self._watch.timed, runner.model.module
        timed(runner.model, "to_cpu", DEVICE)
        timed(model, "to_device", DEVICE)
        timed(detector, "forward", FORWARD)
        timed(detector, "_parse_losses", LOSSES)
        timed(model, "parse_losses", LOSSES)
        timed(torch.Tensor, "backward", BACKWARD)

    def _mmdets(self, runner: Any) -> None:
        self._watch.timed(runner.optimizer, "zero_grad step", STEP)
        self._watch.timed(torch.nn.utils.clip_grad, "clip_grad_norm_", STEP)

    def _deepspeeds(self, engine: Any) -> None:
        timed = self._watch.timed
        timed(engine, "forward backward", ENGINE)
        timed(engine, "step", STEP)
        timed(engine, "save_checkpoint", STATE_FILES)
        timed(engine, "allreduce_gradients _backward_epilogue", REDUCTION)
        if engine.zero_optimization():
            timed(engine.optimizer, "reduce_ready_partitions_and_remove_grads", REDUCTION)
        timed(DeepSpeedZeRoOffload, "pre_sub_module_forward_function post_sub_module_forward_function", REDUCTION)
        timed(DeepSpeedZeRoOffload, "pre_sub_module_backward_function post_sub_module_backward_function", REDUCTION)

    def _ours(self, runner: Any) -> None:
        timed, agvm = self._watch.timed, runner.engine.agvm
        timed(runner.model.watch, "begin checked end", CHECKS)
        timed(overflow, "_norm_is_finite", CHECKS)
        timed(runner.watch, "stop_asked", STOP)
        if agvm is not None:
            timed(agvm, "measure end_micro_batch finish", AGVM)
            timed(agvm._estimator, "observe", AGVM)

    def _checkpoints(self) -> None:
        timed = self._watch.timed
        timed(checkpointing.Checkpointing, "save_state", STATE)
        timed(vault, "_written _sync", DISK)
        timed(vault, "digest", DIGESTS)
        timed(runner.EngineRunner, "save_checkpoint", WEIGHTS)
        timed(checkpointing.Checkpointing, "resume_state", RESUME)
        timed(checkpointing.Checkpointing, "_load", LOAD)


def _alone(watch: Any, device: Any) -> float:
    """Seconds of one ``stop_asked`` when the ranks come to it at once."""
    distributed.barrier()
    start = time.monotonic()
    for _ in range(ALONE):
        watch.stop_asked(device)
    return (time.monotonic() - start) / ALONE
