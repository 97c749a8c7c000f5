"""Launches that are measured against each other in turns: while one trains, the others are stopped (SIGSTOP).

So every ratio is of moments next to each other, whatever else the machine does, and starting costs once a launch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.launch import launch_port

ROOT = Path(__file__).parents[1]
POLL = 0.02
"""Seconds."""


class LaunchEnded(RuntimeError):
    """A launch that should go on has ended, or makes no progress: with what it said last."""


@dataclass
class Launch:
    """A training under DeepSpeed's launcher in a process group of its own, whose TrainerClock writes to ``place/clock``."""

    name: str
    place: Path
    process: subprocess.Popen[bytes]
    started: float
    """On the clock of the updates' ``start`` and ``end``."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What it wrote before its first update."""
    updates: list[dict[str, Any]] = field(default_factory=list)
    _read: int = 0

    def _take(self) -> None:
        if not (self.place / "clock").exists():
            return
        with (self.place / "clock").open() as file:
            file.seek(self._read)
            for line in iter(file.readline, ""):
                if not line.endswith("\n"):
                    break
                self._read += len(line)
                found = json.loads(line)
                if "end" in found:
                    self.updates.append(found)
                else:
                    self.notes |= found

    def wait(self, updates: int, timeout: float = 600) -> None:
        """Until so many updates are done. Raises LaunchEnded."""
        end = time.monotonic() + timeout
        while len(self.updates) < updates:
            time.sleep(POLL)
            self._take()
            if self.process.poll() is not None or time.monotonic() > end:
                tail = (self.place / "output").read_text(errors="replace")[-3000:]
                raise LaunchEnded(f"{self.name}: {len(self.updates)} of {updates} updates\n{tail}")

    def turn(self, updates: int, settle: int) -> list[dict[str, Any]]:
        """Let it train, and take ``updates`` whole updates, in one epoch, after ``settle`` others; then it is stopped."""
        self._take()
        begin = time.monotonic()
        self._signal(signal.SIGCONT)
        found: list[dict[str, Any]] = []
        while len(found) < updates:
            self.wait(len(self.updates) + 1)
            whole = [one for one in self.updates if one["start"] >= begin and not one["first"]]
            found = whole[settle : settle + updates]
        self.stop()
        return found

    def stop(self) -> None:
        """Until its next turn."""
        self._signal(signal.SIGSTOP)

    def kill(self) -> None:
        """With all that it started."""
        with suppress(ProcessLookupError):
            self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)


@contextmanager
def launched(name: str, words: Sequence[str], place: Path, ranks: int) -> Iterator[Launch]:
    """A launch of ``deepspeed --num_gpus ranks words``, killed afterwards; one thread a rank."""
    place.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with launch_port() as port, (place / "output").open("ab") as output:
        command = ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(port), *words]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        launch = Launch(name, place, process, time.monotonic())
        try:
            yield launch
        finally:
            launch.kill()


Turns = dict[str, list[list[dict[str, Any]]]]
"""By launch, its updates in each round."""


def take_turns(
    commands: Mapping[str, tuple[Sequence[str], Path]], ranks: int, rounds: int, updates: int
) -> tuple[Turns, list[Launch]]:
    """``updates`` updates a launch and round, the first of a round being another each time."""
    settle = warm_up = 3
    with ExitStack() as stack:
        launches = []
        for name, (words, place) in commands.items():
            launches.append(stack.enter_context(launched(name, words, place, ranks)))
            launches[-1].wait(warm_up)
            launches[-1].stop()
        turns: Turns = {launch.name: [] for launch in launches}
        for number in range(rounds):
            first = number % len(launches)
            for launch in launches[first:] + launches[:first]:
                turns[launch.name].append(launch.turn(updates, settle))
    return turns, launches
