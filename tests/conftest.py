"""What must be settled before torch and DeepSpeed are imported: one thread a rank, the CPU, and this Python's programs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import tests.standins  # noqa: F401
from tests.faults.table import show

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# DeepSpeed's launcher and its ninja: with another ninja it builds its extensions anew.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def pytest_terminal_summary() -> None:
    show()
