"""What the set-up scripts share: a status line, and commands whose output is watched and kept."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def clock(seconds: float) -> str:
    """Minutes and seconds: 1:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


class StatusLine:
    """How far a long step is: one line that is rewritten, or one every 30 seconds where the output is no terminal."""

    def __init__(self, every: float = 30.0) -> None:
        self.every = every
        self.start = self.shown = time.monotonic()
        self.terminal = sys.stdout.isatty()
        self.open = False

    @property
    def elapsed(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self.start

    def show(self, text: str) -> None:
        """Replace what the line says."""
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:width]:{width}}", end="", flush=True)
            self.open = True
        elif time.monotonic() - self.shown >= self.every:
            print(text, flush=True)
            self.shown = time.monotonic()

    def close(self) -> None:
        """End the line, so that the next print begins a new one."""
        if self.open:
            print(flush=True)
        self.open = False


def run_logged(
    command: Sequence[str], log: Path, watch: Callable[[str], None], cwd: Path, env: Mapping[str, str]
) -> tuple[int, list[str]]:
    """Run a command with its output in ``log``, each line shown to ``watch``. Returns the exit code and the lines."""
    lines: list[str] = []
    quiet, pipe, same = subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT
    with (
        log.open("w") as file,
        subprocess.Popen(command, cwd=cwd, env=env, stdin=quiet, stdout=pipe, stderr=same, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            lines.append(line.rstrip("\n"))
            watch(lines[-1])
    return process.returncode, lines
