"""mmcv's runners, counting updates of the global batch, with checkpoints of the whole engine."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import mmcv
import torch
from deepspeed import comm
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from mmcv.runner import RUNNERS, EpochBasedRunner, IterBasedRunner

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.compat import repeat_mode_switch
from agvm_ds.mmdet.ema import ema_hooks, trained_weights
from agvm_ds.mmdet.plan import Batch
from agvm_ds.mmdet.randomness import random_state, set_random_state
from agvm_ds.mmdet.weights import StateDict, gather_weights, publish

STATE_DIR = "deepspeed"
"""Folder of the DeepSpeed checkpoints in a work dir."""
LATEST = "latest"
"""DeepSpeed's file that names the newest checkpoint."""
RUNNER_KEY = "runner"
"""Where the runner's own state is in a checkpoint's client_state."""


def refuse_nothing_to_resume(work_dir: Path) -> None:
    """Raise ConfigError when there is no DeepSpeed checkpoint in a work dir."""
    if not (work_dir / STATE_DIR / LATEST).is_file():
        raise ConfigError(
            f"--resume: nothing to resume in {work_dir}: no DeepSpeed checkpoint ({STATE_DIR}/{LATEST}); "
            "leave --resume out to start, or give the --work-dir of the run to continue"
        )


class EngineRunner:
    """What both runners share. Mixed in before an mmcv runner whose model is an EngineModel."""

    model: Any
    meta: Any
    logger: Any
    work_dir: Any
    rank: int
    _hooks: list[Any]
    _epoch: int

    def __init__(self, *args: Any, batch: Batch, unrounded: StateDict, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batch = batch
        self.unrounded = unrounded
        self._epoch_start: dict[str, Any] | None = None
        self._resumed: dict[str, Any] | None = None

    @property
    def engine(self) -> Any:
        """The DeepSpeed engine."""
        return self.model.engine

    @property
    def state_dir(self) -> Path:
        """The folder of the DeepSpeed checkpoints."""
        return Path(self.work_dir) / STATE_DIR

    def weights(self) -> StateDict:
        """What is evaluated and published; every rank must call it."""
        return gather_weights(self.engine, self.unrounded)

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

    def save_state(self, tag: str) -> None:
        """Write the engine's whole state under the work dir, for ``--resume``; every rank must call it."""
        states: list[Any] = [None] * comm.get_world_size()
        torch.distributed.all_gather_object(states, {"now": random_state(), "epoch_start": self._epoch_start})
        with trained_weights(self._hooks):
            meta = plain(self.meta or {})
            state = {
                "random": states,
                "seed": meta.get("seed"),
                "hook_msgs": meta.get("hook_msgs", {}),
                "averages": [hook.state() for hook in ema_hooks(self._hooks)],
                **self._pace(),
            }
            self.engine.save_checkpoint(str(self.state_dir), tag=tag, client_state={RUNNER_KEY: state})

    def _pace(self) -> dict[str, Any]:
        """What one update, and one epoch, is."""
        return {"batch": self.batch.train, "updates_per_epoch": self.updates_per_epoch}

    updates_per_epoch: int | None = None
    """None where epochs are not counted."""

    def remove_checkpoints(self, out_dir: str, names: list[str]) -> None:
        """Remove these ``.pth`` files and the engine states that belong to them."""
        if self.rank == 0:
            for name in names:
                (Path(out_dir) / name).unlink(missing_ok=True)
                shutil.rmtree(self.state_dir / Path(name).stem, ignore_errors=True)

    def resume_state(self, loader: Any) -> None:
        """Continue from the newest DeepSpeed checkpoint in the work dir; every rank must call it. Raises ConfigError."""
        refuse_nothing_to_resume(Path(self.work_dir))
        path, state = self._load_state()
        self._iter = int(self.engine.global_steps)
        if self.meta is not None:
            self.meta["hook_msgs"] = state["hook_msgs"]
            if state["seed"] != self.meta.get("seed"):
                self.logger.warning(
                    "resumed with seed %s, begun with %s: data come in another order; --seed %s continues it",
                    *(self.meta.get("seed"), state["seed"], state["seed"]),
                )
        for hook, averages in zip(ema_hooks(self._hooks), state["averages"], strict=True):
            hook.load_state(averages, self.engine.device)
        if len(state["random"]) == comm.get_world_size():
            self._resumed = state["random"][self.rank]
        else:
            ranks = comm.get_world_size(), len(state["random"])
            self.logger.warning("resumed on %d ranks from %d: data order and random state are not continued", *ranks)
        self._continue(loader)
        self.logger.info("resumed from %s at update %d, epoch %d", path, self._iter, self._epoch)

    def _load_state(self) -> tuple[str, dict[str, Any]]:
        """(folder, the runner's state) of the newest checkpoint, once the engine has loaded the rest."""
        newest = self.state_dir / LATEST
        try:
            path, client_state = self.engine.load_checkpoint(str(self.state_dir))
        except ConfigError:
            raise
        except (ZeRORuntimeException, AssertionError, LookupError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"--resume: {newest.parent / newest.read_text().strip()} does not fit this run: {error}\n  the model, "
                "the optimizer's groups, the ZeRO stage, the precision and the number of ranks must be the same"
            ) from error
        if path is None:
            raise ConfigError(f"--resume: the checkpoint that {newest} names cannot be loaded")
        state = client_state[RUNNER_KEY]
        saved = {key: state[key] for key in self._pace()}
        if saved != self._pace():
            raise ConfigError(
                f"--resume: {path} is of a run with {_pace_text(saved)}; this run has {_pace_text(self._pace())}: its "
                "schedule would go on in another place. Use the same batch and data, or start anew with --load-from"
            )
        return str(path), state

    def _continue(self, loader: Any) -> None:
        """Go to the place of ``_iter`` in the data; ``_resumed`` is this rank's random state there, if it is known."""
        raise NotImplementedError

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

    def _continue(self, loader: Any) -> None:
        self._epoch, self._skip = divmod(self._iter, len(loader))
        repeat_mode_switch(self, loader)
        if self._resumed is not None:
            self._epoch_start = self._resumed["epoch_start"]
            set_random_state(self._resumed["now"])

    def train(self, data_loader: Any, **kwargs: Any) -> None:
        """One epoch, or after a resume the rest of one: with its first part's data read again and passed by."""
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
            self.call_hook("after_train_iter")
            del self.data_batch
            self._iter += 1
        self.call_hook("after_train_epoch")
        self._epoch += 1

    def _updates(self, data_loader: Any) -> Any:
        """(index in the epoch, data) of the updates still to do."""
        skip, self._skip = self._skip, 0
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

    def _counter(self) -> int:
        return int(self._iter)

    def _filename(self) -> str:
        return "iter_{}.pth"

    def _continue(self, loader: Any) -> None:
        loader.pass_by(self._iter)

    def train(self, data_loader: Any, **kwargs: Any) -> None:
        """One update; the first one after a resume begins with the random state in which the last one ended."""
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            set_random_state(resumed["now"])
        super().train(data_loader, **kwargs)


def _pace_text(pace: dict[str, Any]) -> str:
    updates = pace["updates_per_epoch"]
    return f"batches of {pace['batch']} images" + (f", {updates} updates an epoch" if updates is not None else "")


def plain(value: Any) -> Any:
    """A copy with plain types only, so that ``torch.load`` reads it with weights_only."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or (isinstance(value, (str, bool, int, float)) and type(value) in (str, bool, int, float)):
        return value
    return value.item() if hasattr(value, "item") else str(value)
