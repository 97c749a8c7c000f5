"""When a run is saved: mmcv's own rules, the work done on all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmcv.runner import HOOKS
from mmcv.runner.hooks import CheckpointHook


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
