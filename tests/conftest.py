"""What must be settled before torch and DeepSpeed are imported: one thread a rank, the CPU, and this Python's programs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tests.standins  # noqa: F401
from tests import extensions
from tests.faults.table import show

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# DeepSpeed's launcher and its ninja: with another ninja it builds its extensions anew.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


BUILD = pytest.StashKey[subprocess.Popen[bytes]]()


def starts_ranks(item: pytest.Item) -> bool:
    return not {"distributed", "hosts"}.isdisjoint(item.path.parts)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=starts_ranks)


def pytest_collection_finish(session: pytest.Session) -> None:
    ranks = sum(map(starts_ranks, session.items))
    if 0 < ranks < len(session.items) and not session.config.option.collectonly:
        session.config.stash[BUILD] = extensions.begin()


def pytest_unconfigure(config: pytest.Config) -> None:
    if build := config.stash.get(BUILD, None):
        extensions.end(build)


def pytest_terminal_summary() -> None:
    show()
