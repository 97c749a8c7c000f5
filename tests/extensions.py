"""DeepSpeed's CPU extensions, built beside the tests that start no ranks: python -m tests.extensions

The first ranks that need one compile it while the others wait, on two cores seven minutes in all on a fresh machine. torch
keeps them (``TORCH_EXTENSIONS_DIR``) and its lock lets ranks wait for what is being built here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

BUILDERS = ("ShareMemCommBuilder", "FusedAdamBuilder", "CPUAdamBuilder", "CPUAdagradBuilder", "CPULionBuilder")


def begin() -> subprocess.Popen[bytes]:
    """Start the build: one compiler at a time, after whatever else wants the processor."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.extensions"],
        env={**os.environ, "MAX_JOBS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )


def end(build: subprocess.Popen[bytes]) -> None:
    """Stop it with its compilers, if it still goes on; the system gives its lock back: who needs an extension builds it."""
    if build.poll() is None:
        os.killpg(build.pid, signal.SIGTERM)
        build.wait()


def main() -> None:
    """Build what is not there yet."""
    os.nice(5)
    from deepspeed.accelerator import get_accelerator

    for name in BUILDERS:
        get_accelerator().create_op_builder(name).load()


if __name__ == "__main__":
    main()
