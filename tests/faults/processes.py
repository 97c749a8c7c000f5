"""Faults that a test's config puts into a run: ``custom_imports`` names this module, a custom hook names the fault."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmcv.runner import HOOKS, Hook

from agvm_ds.checkpoints import vault
from agvm_ds.mmdet import runner as runners


def config_lines(kind: str, **settings: Any) -> str:
    """Lines of a config that cause a fault."""
    words = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    return (
        'custom_imports = dict(imports=["tests.faults.processes"])\n'
        f'custom_hooks = [*globals().get("custom_hooks", []), dict(type="{kind}", {words})]'
    )


def die(*_: Any, **__: Any) -> None:
    """As if the system had killed this process."""
    os.kill(os.getpid(), signal.SIGKILL)


@HOOKS.register_module()
class Killed(Hook):
    """One rank dies in an update (from 0): in its forward, its backward or its measure; or when a state is saved after it."""

    def __init__(self, rank: int, update: int, where: str) -> None:
        self.rank, self.update, self.where = rank, update, where

    def before_train_iter(self, runner: Any) -> None:
        if runner.rank == self.rank and runner.iter == self.update:
            getattr(self, f"_in_{self.where}")(runner)

    def _in_forward(self, runner: Any) -> None:
        runner.model.module.backbone.register_forward_hook(die)

    def _in_backward(self, runner: Any) -> None:
        next(p for p in runner.model.module.backbone.parameters() if p.requires_grad).register_hook(die)

    def _in_measure(self, runner: Any) -> None:
        runner.engine.agvm.shards.add_up = die

    def _in_saving(self, runner: Any) -> None:
        """With half of a file written."""
        engine = runner.engine.checkpoint_engine
        engine.save = _half(engine.save)

    def _in_publishing(self, runner: Any) -> None:
        """With the epoch's state saved, before its weights are published and evaluated."""
        runners.publish = die

    def _in_evaluating(self, runner: Any) -> None:
        hook = next(hook for hook in runner.hooks if type(hook).__name__ == "EngineEvalHook")
        hook.detector.register_forward_hook(die)

    def _in_committing(self, runner: Any) -> None:
        """With every file written, before the checkpoint has its name."""
        vault._rename = die


def _half(save: Callable[..., None]) -> Callable[..., None]:
    def half(state_dict: Any, path: str) -> None:
        save(state_dict, path)
        written = Path(path).read_bytes()
        Path(path).write_bytes(written[: len(written) // 2])
        die()

    return half


@HOOKS.register_module()
class Terminated(Hook):
    """One rank gets SIGTERM, as from a scheduler, in an update (None: before the first), or in the evaluation after it."""

    def __init__(self, rank: int, update: int | None, evaluating: bool = False) -> None:
        self.rank, self.update, self.evaluating = rank, update, evaluating

    def before_run(self, runner: Any) -> None:
        if self.update is None:
            self._send(runner)

    def before_train_iter(self, runner: Any) -> None:
        if runner.iter == self.update:
            self._send(runner)

    def _send(self, runner: Any) -> None:
        if runner.rank != self.rank:
            return
        if not self.evaluating:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            hook = next(hook for hook in runner.hooks if type(hook).__name__ == "EngineEvalHook")
            hook.detector.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGTERM))


@HOOKS.register_module()
class Slow(Hook):
    """One rank is late in an update."""

    def __init__(self, rank: int, update: int, seconds: float) -> None:
        self.rank, self.update, self.seconds = rank, update, seconds

    def before_train_iter(self, runner: Any) -> None:
        if runner.rank == self.rank and runner.iter == self.update:
            time.sleep(self.seconds)


@HOOKS.register_module()
class Waiting(Hook):
    """The run waits in an update until a file appears; another file says that it waits."""

    def __init__(self, update: int, waits: str, until: str) -> None:
        self.update, self.waits, self.until = update, Path(waits), Path(until)

    def before_train_iter(self, runner: Any) -> None:
        if runner.iter == self.update:
            self.waits.touch()
            while not self.until.exists():
                time.sleep(0.1)
