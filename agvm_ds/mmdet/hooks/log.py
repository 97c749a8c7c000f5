"""AGVM's numbers and the images a second in mmcv's log."""

from __future__ import annotations

import time
from typing import Any

import torch
from mmcv.runner import HOOKS, Hook

RATE = "lr/"
"""How the log's entries for effective rates begin."""


class Rate(float):
    """A learning rate, of which mmcv's log would show four places and its JSON five: shown as mmcv's own ``lr`` is."""

    def __format__(self, form: str) -> str:
        return format(float(self), ".3e")

    def __round__(self, places: Any = None) -> float:  # type: ignore[override]
        return float(f"{float(self):.5g}")


@HOOKS.register_module()
class AGVMLogHook(Hook):
    """In mmcv's log: the gradient's norm and each module's scale factor, means over its interval, and effective rate."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def after_train_iter(self, runner: Any) -> None:
        """Add this update's numbers to the log buffer."""
        numbers: dict[str, float] = {}
        if self.engine.agvm is not None:
            numbers = {f"mu/{name}": mu for name, mu in self.engine.agvm.scale_factors.items()}
            rates = {f"{RATE}{name}": Rate(rate) for name, rate in self.engine.agvm.effective_rates.items()}
            runner.log_buffer.output.update(rates)
        norm = self.engine.get_global_grad_norm()
        if norm is not None:
            numbers["grad_norm"] = float(norm)
        runner.log_buffer.update(numbers)

    def after_train_epoch(self, runner: Any) -> None:
        """What is logged next is an evaluation."""
        for key in [key for key in runner.log_buffer.output if key.startswith(RATE)]:
            del runner.log_buffer.output[key]


@HOOKS.register_module()
class ThroughputHook(Hook):
    """Seconds spent in updates, data loading included, evaluation and checkpoints not; images/s in mmcv's log.

    images: in an update.
    """

    def __init__(self, images: int) -> None:
        self.images = images
        self.seconds = 0.0
        self.updates = 0
        self._since = time.perf_counter()

    def before_run(self, runner: Any) -> None:
        """Where epochs are not counted, the first update begins here."""
        self._since = time.perf_counter()

    def before_train_epoch(self, runner: Any) -> None:
        """An epoch's first update begins with its data."""
        self._since = time.perf_counter()

    def after_train_iter(self, runner: Any) -> None:
        """An update is over."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        taken = now - self._since
        self.seconds, self.updates, self._since = self.seconds + taken, self.updates + 1, now
        # Weighted by its seconds: the mean over an interval is then all its images over all its seconds.
        runner.log_buffer.update({"images/s": self.images / taken}, count=taken)

    @property
    def speed(self) -> float:
        """Images a second so far."""
        return self.updates * self.images / self.seconds if self.seconds else 0.0
