"""A folder of DeepSpeed checkpoints, each written whole or not at all, with the digests that show damage.

DeepSpeed writes a checkpoint into a draft folder; when every rank has written its files, and the disk has them, the draft
gets its name, and only then ``latest`` names it. A run that is killed at any moment leaves the checkpoints before as they
were. Works on one folder that all hosts share, and on one folder a host: then each has the files of its own ranks, and a
manifest.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm
from pydantic import BaseModel, ConfigDict, ValidationError

from agvm_ds.checkpoints.layout import Layout
from agvm_ds.config import ConfigError

MANIFEST = "manifest.json"
LATEST = "latest"
"""DeepSpeed's file that names the newest checkpoint."""


class CheckpointError(ConfigError):
    """A checkpoint that cannot be written or read: the message says which, what is wrong, and what is left."""


class NotWrittenError(CheckpointError):
    """A checkpoint could not be written: the disk, its rights, or another rank's death."""


class File(BaseModel):
    """One file of a checkpoint, by the rank that wrote it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    rank: int
    size: int
    sha256: str
    host: str | None = None
    """Who wrote it, where each host has a folder of its own."""

    def missing(self, folder: Path) -> str | None:
        """What to say when it is not there."""
        path = folder / self.name
        if path.is_file():
            return None
        away = f" on {socket.gethostname()}: it is in this folder of {self.host}; use the same hosts in the same order, or "
        return f"{path}: missing{away + 'copy it into a folder that all share' if self.host else ''}"

    def problem(self, folder: Path) -> str | None:
        """What is wrong with it now, None when it is what was written."""
        path = folder / self.name
        if missing := self.missing(folder):
            return missing
        size = path.stat().st_size
        if size != self.size:
            return f"{path}: {size} bytes, {self.size} were written: cut short or overwritten"
        return None if digest(path) == self.sha256 else f"{path}: not the bytes that were written (SHA-256 differs)"


class Manifest(BaseModel):
    """What a checkpoint is, and what it consists of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    update: int
    interim: bool
    """Written because the run had to stop; it goes when a later one is there."""
    seed: int | None
    """The run's, so that it can go on with the same one."""
    layout: Layout
    files: list[File]


class Vault:
    """The checkpoints of one run, ``folder/<tag>``. Every rank must call every method, except where said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # What any process may ask

    def latest(self) -> str | None:
        """The tag of the newest checkpoint, None when there is none."""
        try:
            return (self.folder / LATEST).read_text().strip() or None
        except FileNotFoundError:
            return None

    def manifest(self, tag: str) -> Manifest | None:
        """None for a checkpoint that DeepSpeed alone wrote. Raises CheckpointError for one that cannot be read."""
        path = self.folder / tag / MANIFEST
        try:
            return Manifest.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise CheckpointError(f"{path}: damaged: {error.errors()[0]['msg']}") from None

    def by_age(self) -> list[str]:
        """Tags with a readable manifest, the newest first."""
        ages = {}
        for path in self.folder.glob(f"[!.]*/{MANIFEST}"):
            try:
                found = Manifest.model_validate_json(path.read_bytes())
            except (ValidationError, FileNotFoundError):
                continue  # damaged: never chosen, never removed; or removed just now
            ages[path.parent.name] = found.update, not found.interim, path.parent.name
        return sorted(ages, key=ages.__getitem__, reverse=True)

    def damage(self, tag: str) -> list[str]:
        """What is wrong with a checkpoint's files, for one process that reads them all; empty when it is whole."""
        files, problems = self._files(tag)
        found: dict[str, list[str | None]] = {}
        for file in files:  # hosts with folders of their own may each have written one of the same name
            found.setdefault(file.name, []).append(file.problem(self.folder / tag))
        return problems + [told[0] for told in found.values() if told[0] and None not in told]

    def _files(self, tag: str) -> tuple[list[File], list[str]]:
        """(what a checkpoint consists of, what is wrong with its manifest)."""
        try:
            manifest = self.manifest(tag)
        except CheckpointError as error:
            return [], [str(error)]
        return (manifest.files, []) if manifest else ([], [f"{self.folder / tag / MANIFEST}: missing"])

    # What all ranks do together

    def save(
        self,
        engine: Any,
        tag: str,
        client_state: dict[str, Any],
        layout: Layout,
        seed: int | None = None,
        interim: bool = False,
    ) -> None:
        """Write a checkpoint. Raises NotWrittenError when a file cannot be; the ones before are whole then."""
        draft = self.folder / f".{tag}.draft"
        self._once_a_folder(self._remove_drafts)
        try:
            engine.save_checkpoint(str(self.folder), tag=draft.name, client_state=client_state, save_latest=False)
            files = [
                _written(path, None if self.shared else socket.gethostname())
                for path in _own_files(engine, self.folder, draft.name)
            ]
        except (OSError, RuntimeError) as error:
            if isinstance(error, OSError) or _TORCH_WRITES in str(error):
                _unlink(_own_files(engine, self.folder, draft.name))
                raise self._unwritten(tag, error) from error
            raise
        manifest = Manifest(
            update=int(engine.global_steps), interim=interim, seed=seed, layout=layout, files=_union(files)
        ).model_dump_json()
        self._once_a_folder(lambda: _write(draft / MANIFEST, manifest))
        self._once_a_folder(lambda: _rename(draft, self.folder / tag))
        self._once_a_folder(lambda: _write(self.folder / LATEST, tag))

    def problems(self, tag: str) -> list[str]:
        """What is wrong with a checkpoint's files, the ranks checking them together; empty when it is whole."""
        return list(dict.fromkeys(_union(self._own_problems(tag))))

    def _own_problems(self, tag: str) -> list[str]:
        files, problems = self._files(tag)
        mine = [file for file in files if file.rank % comm.get_world_size() == comm.get_rank()]
        return problems + [problem for file in mine if (problem := file.problem(self.folder / tag))]

    def elsewhere(self, tag: str) -> list[str]:
        """Files of a checkpoint that some rank does not find in its folder."""
        manifest = self.manifest(tag)
        files = manifest.files if manifest is not None else []
        return list(dict.fromkeys(_union([missing for file in files if (missing := file.missing(self.folder / tag))])))

    def newest_whole(self, before: str) -> str | None:
        """The newest checkpoint, another than ``before``, with nothing wrong in it."""
        return next((tag for tag in _agreed(self.by_age()) if tag != before and not self.problems(tag)), None)

    def prune(self, keep: int | None) -> None:
        """Remove all but the newest ``keep`` (None: all stay), and interim ones that are not the newest."""
        self._once_a_folder(lambda: _remove(self.folder / tag for tag in self._old(keep)))

    def _old(self, keep: int | None) -> set[str]:
        tags = self.by_age()
        interim = {tag for tag in tags[1:] if (manifest := self.manifest(tag)) and manifest.interim}
        return (interim | set(tags[keep:] if keep else [])) - {self.latest() or ""}

    def set_aside(self) -> Path | None:
        """Give the folder of an earlier run another name, so that nothing in it is lost; where it is now."""
        aside = self.folder.with_name(f"{self.folder.name}_{_agreed(time.strftime('%Y%m%d_%H%M%S'))}")
        used = self.folder.is_dir() and any(path.is_dir() for path in self.folder.glob("[!.]*"))
        self._once_a_folder(lambda: _rename(self.folder, aside) if used else None)
        return aside if any(_union([used])) else None

    def _remove_drafts(self) -> None:
        """What killed runs left unfinished."""
        _remove(self.folder.glob(".*.draft"))

    def _once_a_folder(self, action: Callable[[], Any]) -> None:
        """Let one rank do it, or one rank a host where each has a folder of its own; the others wait."""
        if self._acts:
            try:
                action()
            except OSError as error:
                raise self._unwritten(self.folder.name, error) from error
        comm.barrier()

    @property
    def shared(self) -> bool:
        """Whether all ranks see one folder."""
        return all(self._see_rank_zeros)

    @property
    def _acts(self) -> bool:
        """Whether this rank is the first that sees its folder: rank 0, or a host's first rank that does not see rank 0's."""
        sees = self._see_rank_zeros[comm.get_rank()]
        return comm.get_rank() == 0 or (int(os.environ.get("LOCAL_RANK", "0")) == 0 and not sees)

    @cached_property
    def _see_rank_zeros(self) -> list[bool]:
        """For each rank, whether its folder is rank 0's."""
        token = self.folder / f".{_agreed(uuid.uuid4().hex)}"
        if comm.get_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            token.touch()
        comm.barrier()
        found = _union([token.exists()])
        if comm.get_rank() == 0:
            token.unlink()
        return found

    def _unwritten(self, tag: str, error: Exception) -> NotWrittenError:
        free = shutil.disk_usage(self.folder).free / 2**20
        latest = self.latest()
        left = f"the checkpoint before, {self.folder / latest}, is as it was" if latest else "there is none before it"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return NotWrittenError(
            f"checkpoint {tag} cannot be written: {reason} ({free:.0f} MiB free on its disk); {left}; "
            "make room and continue with --resume"
        )


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_TORCH_WRITES = "inline_container"
"""In every message of torch's writer, which has no exception of its own."""


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _own_files(engine: Any, folder: Path, tag: str) -> list[Path]:
    """The files of a checkpoint that this rank writes, as DeepSpeed decides it."""
    names = []
    if engine.save_non_zero_checkpoint:
        names.append(engine._get_ckpt_name(str(folder), tag))
    if engine.save_zero_checkpoint:
        names.append(engine._get_zero_ckpt_name(str(folder), tag))
    return [Path(name) for name in names]


def _written(path: Path, host: str | None) -> File:
    """A file's entry, once the disk has it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return File(name=path.name, rank=comm.get_rank(), size=path.stat().st_size, sha256=digest(path), host=host)


def _write(path: Path, text: str) -> None:
    """Write a small file whole or not at all, and have it on the disk."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    _sync(path.parent)


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _rename(draft: Path, final: Path) -> None:
    """Give a folder its name, in the place of what had it."""
    old = final.with_name(f".{final.name}.old.draft")
    if final.is_dir():
        os.rename(final, old)
    os.rename(draft, final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _union(mine: list[Any]) -> list[Any]:
    found: list[Any] = [None] * comm.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return [item for part in found for item in part]


def _agreed(value: Any) -> Any:
    """Rank 0's value."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
