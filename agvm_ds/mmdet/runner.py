"""mmcv's runners, counting updates of the global batch, with checkpoints of the whole engine."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import mmcv
import torch
from deepspeed import comm
from mmcv.runner import RUNNERS, EpochBasedRunner, IterBasedRunner

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.randomness import random_state, set_random_state
from agvm_ds.mmdet.weights import gather_weights, publish

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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._epoch_start: dict[str, Any] | None = None

    @property
    def engine(self) -> Any:
        """The DeepSpeed engine."""
        return self.model.engine

    @property
    def state_dir(self) -> Path:
        """The folder of the DeepSpeed checkpoints."""
        return Path(self.work_dir) / STATE_DIR

    def save_checkpoint(
        self,
        out_dir: str,
        filename_tmpl: str | None = None,
        save_optimizer: bool = True,
        meta: dict[str, Any] | None = None,
        create_symlink: bool = True,
    ) -> None:
        """Write the weights as plain mmdet reads them; every rank must call it. Optimizer state is never in them."""
        weights = gather_weights(self.engine)
        if self.rank == 0:
            name = (filename_tmpl or self._filename()).format(self._counter() + 1)
            publish(weights, self._about(meta or {}), Path(out_dir) / name, "latest.pth" if create_symlink else None)
        comm.barrier()

    def _about(self, meta: dict[str, Any]) -> dict[str, Any]:
        own = {"epoch": self._epoch + 1, "iter": self._iter, "CLASSES": self.model.CLASSES}  # type: ignore[has-type]
        stamp = {"mmcv_version": mmcv.__version__, "time": time.asctime()}
        return dict(plain({**stamp, **meta, **(self.meta or {}), **own}))

    def save_state(self, tag: str) -> None:
        """Write the engine's whole state under the work dir, for ``--resume``; every rank must call it."""
        states: list[Any] = [None] * comm.get_world_size()
        torch.distributed.all_gather_object(states, {"now": random_state(), "epoch_start": self._epoch_start})
        client_state = {RUNNER_KEY: {"random": states, "hook_msgs": plain(self.meta or {}).get("hook_msgs", {})}}
        self.engine.save_checkpoint(str(self.state_dir), tag=tag, client_state=client_state)

    def remove_checkpoints(self, out_dir: str, names: list[str]) -> None:
        """Remove these ``.pth`` files and the engine states that belong to them."""
        if self.rank == 0:
            for name in names:
                (Path(out_dir) / name).unlink(missing_ok=True)
                shutil.rmtree(self.state_dir / Path(name).stem, ignore_errors=True)

    def resume_state(self, updates_per_epoch: int) -> None:
        """Continue from the newest DeepSpeed checkpoint in the work dir; every rank must call it."""
        refuse_nothing_to_resume(Path(self.work_dir))
        path, client_state = self.engine.load_checkpoint(str(self.state_dir))
        if path is None:
            raise ConfigError(f"--resume: the checkpoint that {self.state_dir / LATEST} names cannot be loaded")
        updates = int(self.engine.global_steps)
        self._iter, self._epoch = updates, updates // updates_per_epoch
        self._skip = updates % updates_per_epoch
        state = client_state[RUNNER_KEY]
        if self.meta is not None:
            self.meta["hook_msgs"] = state["hook_msgs"]
        if len(state["random"]) == comm.get_world_size():
            mine = state["random"][self.rank]
            set_random_state(mine["now"])
            self._epoch_start = mine["epoch_start"]
        else:
            self.logger.warning(
                "resumed on %d ranks from %d: data order and random state are not continued",
                comm.get_world_size(),
                len(state["random"]),
            )
        self.logger.info("resumed from %s at update %d, epoch %d", path, updates, self._epoch)

    _skip = 0

    def _counter(self) -> int:
        raise NotImplementedError

    def _filename(self) -> str:
        raise NotImplementedError


@RUNNERS.register_module()
class EpochBasedEngineRunner(EngineRunner, EpochBasedRunner):
    """EpochBasedRunner over updates; it resumes in the middle of an epoch too."""

    def _counter(self) -> int:
        return int(self._epoch)

    def _filename(self) -> str:
        return "epoch_{}.pth"

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
    """IterBasedRunner over updates; as in mmcv, a resumed run starts a new pass over the data."""

    def _counter(self) -> int:
        return int(self._iter)

    def _filename(self) -> str:
        return "iter_{}.pth"


def plain(value: Any) -> Any:
    """A copy with plain types only, so that ``torch.load`` reads it with weights_only."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or (isinstance(value, (str, bool, int, float)) and type(value) in (str, bool, int, float)):
        return value
    return value.item() if hasattr(value, "item") else str(value)
