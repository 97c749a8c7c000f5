"""When a run is evaluated, and which checkpoint is the best: mmdet's own rules, on gathered weights."""

from __future__ import annotations

from typing import Any

from mmcv.runner import HOOKS
from mmdet.core.evaluation.eval_hooks import DistEvalHook
from torch import nn

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.evaluate import Metrics, broadcast_object, collect, detect, metrics_of
from agvm_ds.mmdet.process.signals import StopAsked
from agvm_ds.mmdet.progress import counted
from agvm_ds.mmdet.randomness import untouched_randomness


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
