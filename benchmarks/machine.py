"""What a measurement was taken on, in words: no name, no path."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import psutil  # type: ignore[import-untyped]

PACKAGES = ("torch", "deepspeed", "mmdet", "mmcv-full")


def describe() -> dict[str, str]:
    """The processor, cores that may be used, memory, system, Python, and the packages' versions."""
    return {
        "cpu": _model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def _model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
