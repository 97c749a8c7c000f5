"""mmcv hooks that know the engine: checkpoints, evaluation, AGVM's numbers in the log, and the clock."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from mmcv.runner import HOOKS, Hook
from mmcv.runner.hooks import CheckpointHook
from mmdet.core.evaluation.eval_hooks import DistEvalHook
from torch import nn

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.evaluate import Metrics, broadcast_object, collect, detect, metrics_of
from agvm_ds.mmdet.progress import counted
from agvm_ds.mmdet.randomness import untouched_randomness
from agvm_ds.mmdet.signals import StopAsked


@HOOKS.register_module()
class EngineCheckpointHook(CheckpointHook):
    """mmcv's CheckpointHook with all its options, called on every rank: weights and state are spread over the ranks."""

    def _save_checkpoint(self, runner: Any) -> None:
        name = self._name(runner)
        if self.save_optimizer:
            runner.save_state(Path(name).stem)  # first: what latest.pth shows can be resumed
        runner.save_checkpoint(self.out_dir, **{**self.args, "filename_tmpl": name})
        if runner.meta is not None:
            runner.meta.setdefault("hook_msgs", {})["last_ckpt"] = str(Path(self.out_dir) / name)
        if self.max_keep_ckpts > 0 and runner.rank == 0:
            current = (runner.epoch if self.by_epoch else runner.iter) + 1
            for step in range(current - self.max_keep_ckpts * self.interval, 0, -self.interval):
                (Path(self.out_dir) / self._template().format(step)).unlink(missing_ok=True)

    def _template(self) -> str:
        return str(self.args.get("filename_tmpl", "epoch_{}.pth" if self.by_epoch else "iter_{}.pth"))

    def _name(self, runner: Any) -> str:
        return self._template().format((runner.epoch if self.by_epoch else runner.iter) + 1)


@HOOKS.register_module()
class EngineEvalHook(DistEvalHook):
    """mmdet's DistEvalHook with all its options, on gathered weights in a plain detector."""

    def __init__(self, *args: Any, detector: nn.Module, engine: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.detector = detector
        self.engine = engine
        self.latest_metrics: dict[str, float] = {}
        self._evaluated = -1

    def _should_evaluate(self, runner: Any) -> bool:
        """As mmcv, and after the last epoch or update: a run ends with metrics of its last weights."""
        last = self.is_last_epoch(runner) if self.by_epoch else self.is_last_iter(runner)
        return bool(last or super()._should_evaluate(runner))

    def after_run(self, runner: Any) -> None:
        """A resumed run that had nothing left to do tells the metrics of its weights; they are not a new best."""
        if self._evaluated != self.engine.global_steps:
            self._measure(runner)

    def _do_evaluate(self, runner: Any) -> None:
        if self._should_evaluate(runner):
            self._evaluate(runner)

    def _measure(self, runner: Any) -> float | None:
        self._evaluated = self.engine.global_steps
        try:
            with untouched_randomness():
                key_score = self._measured(runner)
        except StopAsked:
            runner.stop()
            raise
        runner.log_buffer.output |= {"eval_iter_num": len(self.dataloader), "update": self.engine.global_steps}
        return key_score

    def _measured(self, runner: Any) -> float | None:
        self.detector.load_state_dict(runner.weights())
        shown = counted(self.dataloader, len(self.dataloader), "evaluation", runner.rank)
        batches = runner.watch.listening(shown, self.engine.device)
        shares = detect(self.detector, batches, self.engine.device)
        self.latest_results = collect(shares, len(self.dataloader.dataset))
        return self.evaluate(runner, self.latest_results)

    def _evaluate(self, runner: Any) -> None:
        key_score = self._measure(runner)
        if self.save_best and key_score is not None:
            if runner.rank != 0:
                self.best_ckpt_path = None  # rank 0 removes the one before
            self._save_ckpt(runner, key_score)

    def evaluate(self, runner: Any, results: Any) -> float | None:
        """Metrics on rank 0, then known to every rank and its log buffer; returns the score for ``save_best``."""
        found = Metrics()
        if runner.rank == 0:
            found = metrics_of(self.dataloader.dataset, results, self.eval_kwargs, runner.logger)
        found = broadcast_object(found)
        self.latest_metrics = metrics = found.numbers
        runner.log_buffer.output.update(metrics)
        runner.log_buffer.ready = True
        if self.save_best is None or not metrics:
            return None
        if found.undetected and self.key_indicator not in metrics:
            return None  # no score yet; "auto" takes the first name of an evaluation that has all
        if self.key_indicator == "auto":
            self._init_rule(self.rule, next(iter(metrics)))
        if self.key_indicator not in metrics:
            raise ConfigError(f"evaluation.save_best = {self.key_indicator!r}: the metrics are {', '.join(metrics)}")
        return metrics[self.key_indicator]


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
