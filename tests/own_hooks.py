"""Hooks as a user writes them: a config names this module in ``custom_imports`` and them by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmcv.runner import HOOKS, Hook


@HOOKS.register_module()
class Seen(Hook):
    """What each rank trains on."""

    def after_train_iter(self, runner: Any) -> None:
        shapes = [list(batch["img"].data[0].shape[-2:]) for batch in runner.data_batch]
        size = getattr(runner.model.module, "_input_size", None)
        pace = dict(lr=runner.current_lr()[0], momentum=runner.current_momentum()[0])
        line = dict(iter=runner.iter, epoch=runner.epoch, **pace, shapes=shapes, size=size)
        with (Path(runner.work_dir) / f"seen_{runner.rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


@HOOKS.register_module()
class Published(Hook):
    """Wants the epoch's weights, as a hook that uploads them: mmcv calls it after its own that saves them."""

    def after_train_epoch(self, runner: Any) -> None:
        assert (Path(runner.work_dir) / f"epoch_{runner.epoch + 1}.pth").exists()


@HOOKS.register_module()
class Break(Hook):
    """A user's mistake, in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def after_train_iter(self, runner: Any) -> None:
        if runner.epoch == self.epoch:
            raise RuntimeError("the cable is out")


@HOOKS.register_module()
class StopEarly(Hook):
    """Ends a run after so many epochs or updates, as a hook of patience would."""

    def __init__(self, epochs: int | None = None, updates: int | None = None) -> None:
        self.epochs, self.updates = epochs, updates

    def after_train_epoch(self, runner: Any) -> None:
        if runner.epoch + 1 == self.epochs:
            runner._max_epochs = runner.epoch + 1

    def after_train_iter(self, runner: Any) -> None:
        if runner.iter + 1 == self.updates:
            runner._max_iters = runner.iter + 1
