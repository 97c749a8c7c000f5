"""A run's state on disk, beside the weights that it publishes: when it is written, and how a run goes on from it."""

from __future__ import annotations

import glob
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm
from deepspeed.runtime.zero.utils import ZeRORuntimeException

from agvm_ds.checkpoints import (
    CheckpointError,
    Layout,
    Manifest,
    Placed,
    Vault,
    WholeState,
    layout_of,
    load_into,
    weights_only,
)
from agvm_ds.config import ConfigError
from agvm_ds.engine import STATE_KEY
from agvm_ds.mmdet.detector.weights import StateDict
from agvm_ds.mmdet.evaluate import broadcast_object
from agvm_ds.mmdet.hooks.ema import ema_hooks
from agvm_ds.mmdet.optimizer import replaced, settings_of
from agvm_ds.mmdet.plan import Batch
from agvm_ds.mmdet.process.outputs import told
from agvm_ds.mmdet.randomness import random_state
from agvm_ds.mmdet.recipe import differences
from agvm_ds.report.runs import RUN_FILES

STATE_DIR = "deepspeed"
"""Folder of the DeepSpeed checkpoints in a work dir."""
RUNNER_KEY = "runner"
"""Where the runner's own state is in a checkpoint's client_state."""
AVERAGES_PUBLISHED = "averages_published"
"""In it: for each EMA hook, whether its averages were what was evaluated and published at that moment."""
RECIPE = "recipe"
"""In it: see recipe_of."""
UNROUNDED = "unrounded"
"""In it: what half precision has rounded and nothing has trained, as it was before (see keep_unrounded)."""


def refuse_nothing_to_resume(work_dir: Path) -> None:
    """Raise ConfigError when there is no DeepSpeed checkpoint in a work dir."""
    if Vault(work_dir / STATE_DIR).latest() is None:
        aside = sorted(work_dir.glob(f"{STATE_DIR}_*"))
        earlier = (
            f" (an earlier run's are in {aside[-1].name}: name it {STATE_DIR} to continue that one)" if aside else ""
        )
        raise ConfigError(
            f"--resume: nothing to resume in {work_dir}: no DeepSpeed checkpoint ({STATE_DIR}/latest){earlier}; "
            "leave --resume out to start, or give the --work-dir of the run to continue"
        )


def saved_seed(work_dir: Path) -> int | None:
    """The seed of the run whose newest checkpoint is in a work dir; None when that is not known."""
    vault = Vault(work_dir / STATE_DIR)
    try:
        manifest = vault.manifest(vault.latest() or "")
    except CheckpointError:
        return None  # a resume will say so
    return manifest.seed if manifest is not None else None


def fit_storage(deepspeed: dict[str, Any], work_dir: Path) -> list[str]:
    """Let DeepSpeed write on each host what is read there, and nothing twice; returns a note. Every rank must call it."""
    key, checkpoint = "use_node_local_storage", dict(deepspeed.get("checkpoint") or {})
    own = not Vault(work_dir / STATE_DIR).shared
    if own == bool(checkpoint.get(key)):
        return []
    deepspeed["checkpoint"] = {**checkpoint, key: own}
    hosts = "each host has a work dir of its own" if own else "the hosts share the work dir"
    return [f"{hosts}: checkpoint.{key} is {str(own).lower()}"]


@dataclass(frozen=True)
class Saving:
    """What a run keeps its state by."""

    placed: Placed
    unrounded: StateDict
    recipe: dict[str, Any]
    """See recipe_of."""
    keep: int | None = None
    """How many checkpoints stay; None: all."""


class Checkpointing:
    """Mixed into a runner: saves and resumes the engine, every rank's random state, the hooks, and the place in the data."""

    engine: Any
    meta: Any
    logger: Any
    work_dir: Any
    rank: int
    batch: Batch
    saving: Saving
    _hooks: list[Any]
    _epoch: int
    _iter: int

    updates_per_epoch: int | None = None
    """None where epochs are not counted."""
    _resumed_from: tuple[str, int] | None = None
    """(tag, update)."""
    _layout: Layout | None = None
    _position = (0, 0)
    _epoch_start: dict[str, Any] | None = None

    @property
    def vault(self) -> Vault:
        """The run's DeepSpeed checkpoints."""
        if self._vault is None:
            self._vault = Vault(Path(self.work_dir) / STATE_DIR)
        return self._vault

    _vault: Vault | None = None

    @property
    def layout(self) -> Layout:
        """The engine's; every rank must ask at once."""
        if self._layout is None:
            self._layout = layout_of(self.engine, self.saving.placed)
        return self._layout

    # Saving

    def save_state(self, tag: str, interim: bool = False) -> None:
        """Write the engine's whole state under the work dir, for ``--resume``; every rank must call it.

        interim: it is there because the run stops, and goes when a later one is there.
        """
        if (tag, int(self.engine.global_steps)) == self._resumed_from:
            return  # it is there already
        states: list[Any] = [None] * comm.get_world_size()
        torch.distributed.all_gather_object(states, {"now": random_state(), "epoch_start": self._epoch_start})
        state = self._runner_state(states)
        self.vault.save(self.engine, tag, {RUNNER_KEY: state}, self.layout, state["seed"], interim)
        self.vault.prune(self.saving.keep)

    def set_earlier_aside(self) -> None:
        """Before the first update of a new run; every rank must call it. The files that tell of the earlier run go along."""
        aside = self.vault.set_aside()
        if aside is None:
            return
        self._move_files(Path(self.work_dir), aside)
        self.logger.warning("checkpoints of an earlier run in this work dir are now in %s", aside)

    def _move_files(self, here: Path, there: Path) -> None:
        if self.rank == 0:
            with told(there):
                there.mkdir(exist_ok=True)  # the checkpoints may be on other hosts only
                for file in filter(Path.exists, (here / name for name in RUN_FILES)):
                    file.replace(there / file.name)

    def _runner_state(self, states: list[Any]) -> dict[str, Any]:
        meta = plain(self.meta or {})
        averages = [hook.averages() for hook in ema_hooks(self._hooks)]
        # Under ZeRO-3 every rank writes its client_state: once is enough.
        writes = self.rank == 0 or not self.engine.zero_optimization_partition_weights()
        return {
            "random": states,
            "seed": meta.get("seed"),
            RECIPE: plain(self.saving.recipe),
            "hook_msgs": meta.get("hook_msgs", {}),
            "averages": averages if writes else [{} for _ in averages],
            AVERAGES_PUBLISHED: [hook.in_use for hook in ema_hooks(self._hooks)],
            UNROUNDED: self.saving.unrounded if writes else {},
            "position": list(self._position),
            **self._pace(),
        }

    def _pace(self) -> dict[str, Any]:
        """What one update, and one epoch, is."""
        return {"batch": self.batch.train, "updates_per_epoch": self.updates_per_epoch}

    # Resuming

    def resume_state(self, loader: Any, allow_older: bool = False) -> None:
        """Continue from the newest DeepSpeed checkpoint in the work dir; every rank must call it.

        allow_older: when that one is damaged, from the newest that is not. Raises ConfigError.
        """
        refuse_nothing_to_resume(Path(self.work_dir))
        tag = self._whole_tag(allow_older)
        mine = settings_of(self.engine.basic_optimizer.param_groups)
        state = self._load(tag)
        if others := replaced(mine, settings_of(self.engine.basic_optimizer.param_groups)):
            self.logger.warning(
                "the optimizer goes on with the checkpoint's settings (this run's): %s", ", ".join(others)
            )
        self._refuse_other_pace(tag, state)
        self._tell_other_recipe(state)
        self._move_files(self.vault.folder, Path(self.work_dir))  # of a run that was set aside, and is continued now
        self._iter = int(self.engine.global_steps)
        self._resumed_from = tag, self._iter
        self._take_meta(state)
        self._take_averages(state["averages"])
        self.saving.unrounded.update(broadcast_object(state.get(UNROUNDED, {})))
        own = None
        if len(state["random"]) == comm.get_world_size():
            own = state["random"][self.rank]
            self._epoch_start = own["epoch_start"]
        else:
            ranks = comm.get_world_size(), len(state["random"])
            self.logger.warning("resumed on %d ranks from %d: data order and random state are not continued", *ranks)
        epoch, done = state["position"]
        was, now = state["updates_per_epoch"], self.updates_per_epoch
        self._position = epoch, now if now is not None and (done == was or done > now) else done
        self._continue(loader, self._position, own and own["now"])
        self.logger.info("resumed from %s at update %d, epoch %d", self.vault.folder / tag, self._iter, self._epoch)

    def _continue(self, loader: Any, position: tuple[int, int], now: dict[str, Any] | None) -> None:
        """Go to the place of ``_iter`` in the data. position: (epoch, updates of it that are done). now: the random state."""
        raise NotImplementedError

    def _whole_tag(self, allow_older: bool) -> str:
        tag = str(broadcast_object(self.vault.latest()))
        problems = self.vault.problems(tag)
        if not problems:
            return tag
        older = self.vault.newest_whole(tag)
        damage = "\n  ".join([f"the newest checkpoint, {tag}, is damaged:", *problems])
        if older is None:
            raise CheckpointError(
                f"--resume: {damage}\n  no older one is whole; --load-from starts with published weights"
            )
        if not allow_older:
            raise CheckpointError(f"--resume: {damage}\n  {self._age(older)} is whole: --allow-older continues from it")
        self.logger.warning("%s\n  continuing from %s", damage, self._age(older))
        return older

    def _age(self, tag: str) -> str:
        manifest = self.vault.manifest(tag)
        return f"{tag} (update {manifest.update})" if manifest else tag

    def _load(self, tag: str) -> dict[str, Any]:
        """The runner's state, once the engine has loaded the rest."""
        manifest, folder = self.vault.manifest(tag), self.vault.folder / tag
        assert manifest is not None, "a checkpoint without one counts as damaged"
        try:
            with weights_only():
                if manifest.layout == self.layout:
                    return self._load_as_it_is(tag)
                return self._load_resharded(folder, manifest)
        except ConfigError as error:
            raise CheckpointError(f"--resume: {folder}: {error}") from error
        except (
            ZeRORuntimeException,
            AssertionError,
            EOFError,
            LookupError,
            OSError,
            RuntimeError,
            ValueError,
        ) as error:
            raise CheckpointError(f"--resume: {folder} does not fit this run: {str(error) or repr(error)}") from error
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"--resume: {folder} holds more than data, and is not read: {error}") from error

    def _load_as_it_is(self, tag: str) -> dict[str, Any]:
        with _taken_literally(self.engine):
            path, client_state = self.engine.load_checkpoint(str(self.vault.folder), tag=tag)
        if path is None:
            raise CheckpointError("DeepSpeed finds no checkpoint there")
        if self.engine.agvm is None and STATE_KEY in client_state:
            self.logger.warning("AGVM is off in this run: the checkpoint's scale factors are left out")
        return _runners(client_state)

    def _load_resharded(self, folder: Path, manifest: Manifest) -> dict[str, Any]:
        differences = "; ".join(manifest.layout.differences(self.layout))
        if elsewhere := self.vault.elsewhere(folder.name):
            raise CheckpointError(
                f"in another layout ({differences}) every rank reads every file, and the hosts do not share them:\n  "
                + "\n  ".join(elsewhere)
            )
        self.logger.warning("resuming in another layout: %s", differences)
        saved = WholeState(folder, manifest.layout)
        notes = load_into(self.engine, saved, self.saving.placed, self.layout)
        notes += self._take_agvm(saved.common.get(STATE_KEY))
        for note in notes:
            self.logger.warning("not kept: %s", note)
        return _runners(saved.common)

    def _take_agvm(self, state: Mapping[str, Any] | None) -> list[str]:
        agvm = self.engine.agvm
        if agvm is None:
            return ["scale factors: AGVM is off in this run"] if state else []
        agvm.resume_at(int(self.engine.global_steps))
        return agvm.load_state_dict(state, strict=False) if state else ["no scale factors to keep: they start at 1"]

    def _take_averages(self, averages: list[Any]) -> None:
        hooks = ema_hooks(self._hooks)
        if len(hooks) != len(averages):
            what = len(averages), len(hooks)
            self.logger.warning("not kept: averaged weights: the checkpoint has %d sets of them, this run %d", *what)
            return
        for hook, saved in zip(hooks, averages, strict=True):
            hook.take(self, saved)

    def _take_meta(self, state: Mapping[str, Any]) -> None:
        if self.meta is None:
            return
        self.meta["hook_msgs"] = state["hook_msgs"]
        if state["seed"] != self.meta.get("seed"):
            self.logger.warning(
                "resumed with seed %s, begun with %s: data come in another order; --seed %s continues it",
                *(self.meta.get("seed"), state["seed"], state["seed"]),
            )

    def _tell_other_recipe(self, state: Mapping[str, Any]) -> None:
        """Not refused: a run may be continued for longer, or with another schedule; but a word forgotten does that too."""
        now = plain(self.saving.recipe)
        if others := list(differences(state.get(RECIPE, now), now)):
            self.logger.warning(
                "the run so far had other settings (are all its --cfg-options there?):\n  %s", "\n  ".join(others)
            )

    def _refuse_other_pace(self, tag: str, state: Mapping[str, Any]) -> None:
        saved, here = {key: state[key] for key in self._pace()}, self._pace()
        other_ranks = len(state["random"]) != comm.get_world_size()
        if (
            saved != here
            and other_ranks
            and saved["batch"] == here["batch"]
            and None not in (*saved.values(), *here.values())
        ):
            # mmdet fills each rank's share up to whole micro-batches: so many updates more or less.
            self.logger.warning(
                "%s here, %s before: the epoch goes on where it was", _pace_text(here), _pace_text(saved)
            )
        elif saved != here:
            raise CheckpointError(
                f"--resume: {self.vault.folder / tag} is of a run with {_pace_text(saved)}; this run has "
                f"{_pace_text(here)}: its schedule would go on in another place. Use the same batch and data, "
                "or start anew with --load-from"
            )


@contextmanager
def _taken_literally(engine: Any) -> Iterator[None]:
    """DeepSpeed looks for a checkpoint's files by a pattern, and would read the [ of a folder's name as part of it."""
    find = engine._get_all_ckpt_names
    engine._get_all_ckpt_names = lambda folder, tag: find(glob.escape(folder), tag)
    try:
        yield
    finally:
        del engine._get_all_ckpt_names


def _runners(client_state: Mapping[str, Any]) -> dict[str, Any]:
    if RUNNER_KEY not in client_state:
        raise CheckpointError("it was not written by launch/train.py; --load-from takes weights alone")
    return dict(client_state[RUNNER_KEY])


def _pace_text(pace: Mapping[str, Any]) -> str:
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
