"""Files that a program leaves: whole or not at all, in places that are looked at before anything is computed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from agvm_ds.mmdet.process.errors import HostError


def refuse_unwritable(option: str, file: Path) -> None:
    """Raise HostError when a file cannot be written there: its folder must exist, and it must not be a folder itself."""
    if file.is_dir():
        raise HostError(f"{option} {file}: is a folder")
    if not file.parent.is_dir():
        raise HostError(f"{option} {file}: there is no folder {file.parent}")
    _probe(option, file, file.parent)


def make_folder(option: str, folder: Path) -> None:
    """Make a folder unless it is there. Raises HostError when files cannot be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"{option} {folder}: cannot be written: {error.strerror}") from None
    _probe(option, folder, folder)


def _probe(option: str, place: Path, folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise HostError(f"{option} {place}: cannot be written: {error.strerror}") from None


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which gets its name when it is whole and on the disk; of one that fails nothing is left."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def told(path: Path) -> Iterator[None]:
    """What the system says while this path is written is a HostError that names it."""
    try:
        yield
    except OSError as error:
        raise HostError(f"{path}: cannot be written: {error.strerror or error}") from error
