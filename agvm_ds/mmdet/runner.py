"""mmcv's runners, counting updates of the global batch, with checkpoints of the whole engine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import mmcv
from deepspeed import comm
from mmcv.runner import RUNNERS, EpochBasedRunner, IterBasedRunner

from agvm_ds.mmdet.checkpointing import Checkpointing, Saving, plain
from agvm_ds.mmdet.compat import repeat_mode_switch
from agvm_ds.mmdet.detector.weights import StateDict, gather_weights, publish
from agvm_ds.mmdet.hooks.ema import use_averages
from agvm_ds.mmdet.plan import Batch
from agvm_ds.mmdet.process.signals import Preempted, RankWatch
from agvm_ds.mmdet.randomness import random_state, set_random_state


class EngineRunner(Checkpointing):
    """What both runners share. Mixed in before an mmcv runner whose model is an EngineModel."""

    model: Any

    def __init__(self, *args: Any, batch: Batch, saving: Saving, watch: RankWatch, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batch = batch
        self.saving = saving
        self.watch = watch

    @property
    def engine(self) -> Any:  # type: ignore[override]
        """The DeepSpeed engine."""
        return self.model.engine

    def call_hook(self, fn_name: str) -> None:
        """mmcv's; what is learned from the last hook before an update are the rates that it is made with."""
        super().call_hook(fn_name)  # type: ignore[misc]
        if fn_name == "before_train_iter":
            self._rates = super().current_lr()  # type: ignore[misc]

    def current_lr(self) -> list[float]:
        """For the log, the rates of the last update: a scheduler of DeepSpeed's has moved on to the next one's."""
        return list(self._rates or super().current_lr())  # type: ignore[misc]

    _rates: list[float] | None = None

    def weights(self) -> StateDict:
        """What is evaluated and published; every rank must call it."""
        weights = gather_weights(self.engine, self.saving.unrounded)
        return use_averages(weights, self._hooks, self.saving.unrounded)

    def val(self, data_loader: Any, **kwargs: Any) -> None:
        """A phase "val" of the workflow: losses of the weights that are evaluated and published."""
        if self._validated != self._iter:
            self.model.published.load_state_dict(self.weights())
            self._validated = self._iter
        super().val(data_loader, **kwargs)  # type: ignore[misc]

    _validated: int | None = None

    def save_checkpoint(
        self,
        out_dir: str,
        filename_tmpl: str | None = None,
        save_optimizer: bool = True,
        meta: dict[str, Any] | None = None,
        create_symlink: bool = True,
    ) -> None:
        """Write the weights as plain mmdet reads them; every rank must call it. Optimizer state is never in them."""
        weights = self.weights()
        if self.rank == 0:
            name = (filename_tmpl or self._filename()).format(self._counter() + 1)
            publish(weights, self._about(meta or {}), Path(out_dir) / name, "latest.pth" if create_symlink else None)
        comm.barrier()

    def _about(self, meta: dict[str, Any]) -> dict[str, Any]:
        own = {"epoch": self._epoch + 1, "iter": self._iter, "CLASSES": self.model.CLASSES}
        stamp = {"mmcv_version": mmcv.__version__, "time": time.asctime()}
        return dict(plain({**stamp, **meta, **(self.meta or {}), **own}))

    def stop_if_asked(self) -> None:
        """Save, and raise Preempted on every rank, when any rank was sent SIGTERM; called between updates."""
        if self.watch.stop_asked(self.engine.device):
            self.stop()

    def stop(self) -> None:
        """Save, and raise Preempted; every rank must call it."""
        self.save_state(f"update_{self.engine.global_steps}", interim=True)
        self.logger.warning("stopped by SIGTERM after update %d; --resume continues", self.engine.global_steps - 1)
        raise Preempted

    def _counter(self) -> int:
        raise NotImplementedError

    def _filename(self) -> str:
        raise NotImplementedError


@RUNNERS.register_module()
class EpochBasedEngineRunner(EngineRunner, EpochBasedRunner):
    """EpochBasedRunner over updates; it resumes in the middle of an epoch too."""

    _skip = 0

    def _counter(self) -> int:
        return int(self._epoch)

    def _filename(self) -> str:
        return "epoch_{}.pth"

    def _continue(self, loader: Any, position: tuple[int, int], now: dict[str, Any] | None) -> None:
        self._epoch, self._skip = position
        repeat_mode_switch(self, loader)
        if now is not None:
            set_random_state(now)

    def train(self, data_loader: Any, **kwargs: Any) -> None:
        """One epoch, or after a resume the rest of one: with its first part's data read again and passed by.

        A state is saved before the epoch's evaluation and what else follows its last update, so a resumed run begins with
        that: nothing of it is left out, wherever a run ends.
        """
        self.model.train()
        self.mode = "train"
        self.data_loader = data_loader
        self._max_iters = self._max_epochs * len(data_loader)
        self.call_hook("before_train_epoch")
        for index, data_batch in self._updates(data_loader):
            self.data_batch = data_batch
            self._inner_iter = index
            self.call_hook("before_train_iter")
            self.run_iter(data_batch, train_mode=True, **kwargs)
            self._position = self._epoch, index + 1
            self.call_hook("after_train_iter")
            del self.data_batch
            self._iter += 1
            self.stop_if_asked()
        self.call_hook("after_train_epoch")
        self._epoch += 1
        self._position = self._epoch, 0

    def _updates(self, data_loader: Any) -> Any:
        """(index in the epoch, data) of the updates still to do."""
        skip, self._skip = self._skip, 0
        if skip >= len(data_loader):
            return
        now = random_state()
        if skip and self._epoch_start is not None:
            set_random_state(self._epoch_start)
        else:
            self._epoch_start = now
        updates = iter(data_loader)
        for _ in range(skip):
            next(updates)
        if skip:
            set_random_state(now)
        yield from enumerate(updates, skip)


@RUNNERS.register_module()
class IterBasedEngineRunner(EngineRunner, IterBasedRunner):
    """IterBasedRunner over updates; a resumed run goes on where its data, which have no end, were left."""

    _now: dict[str, Any] | None = None

    def _counter(self) -> int:
        return int(self._iter)

    def _filename(self) -> str:
        return "iter_{}.pth"

    def _continue(self, loader: Any, position: tuple[int, int], now: dict[str, Any] | None) -> None:
        loader.pass_by(self._iter)
        self._now = now

    def train(self, data_loader: Any, **kwargs: Any) -> None:
        """One update; the first one after a resume begins with the random state in which the last one ended."""
        now, self._now = self._now, None
        if now is not None:
            set_random_state(now)
        super().train(data_loader, **kwargs)
        self.stop_if_asked()


ENGINE_RUNNERS = {"EpochBasedRunner": EpochBasedEngineRunner, "IterBasedRunner": IterBasedEngineRunner}
"""For mmcv's runners, by name, the ones that train an engine."""
