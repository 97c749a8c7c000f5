"""``deepspeed --hostfile`` as a user types it on the first of several hosts."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.hosts.namespaces import Network
from tests.launch import until
from tests.trainer import ROOT

LIMIT = 400
"""Seconds in which any launch here must have ended, or it hangs."""


@dataclass
class Launch:
    """One that was started: on every host the ranks of ``slots``."""

    network: Network
    process: subprocess.Popen[bytes]
    log: Path
    begin: float = field(default_factory=time.monotonic)
    """What ``wait`` measures from: set it to ``time.monotonic()`` at a fault."""
    seconds: float = 0.0
    """How long it took until the last process had ended."""

    @property
    def output(self) -> str:
        """What the first host's terminal shows; pdsh puts the host before each line."""
        return self.log.read_text(errors="replace")

    def reaches(self, file: Path) -> None:
        """Wait until a rank has made a file."""
        until(lambda: file.exists() or self.process.poll() is not None, LIMIT)
        assert file.exists(), self.output

    def wait(self) -> int:
        """Wait until the command, and the launchers and ranks of all hosts, have ended; its exit code."""
        end = time.monotonic() + LIMIT
        left = {host.name: host for host in self.network.hosts}
        while (left or self.process.poll() is None) and time.monotonic() < end:
            for name in [name for name, host in left.items() if not host.launched()]:
                del left[name]
            time.sleep(0.2)
        assert not left and self.process.poll() is not None, f"{[*left, self.process.poll()]}\n{self.output}"
        self.seconds = time.monotonic() - self.begin
        return self.process.returncode

    def interrupt(self) -> None:
        """Ctrl-C in the terminal: every process in its foreground gets SIGINT, but for nsenter, which is not of the host."""
        for process in self.network.hosts[0].processes():
            with suppress(ProcessLookupError, psutil.NoSuchProcess):  # one that has just ended
                if os.getpgid(process.pid) == self.process.pid:
                    process.send_signal(signal.SIGINT)


@contextmanager
def launched(
    network: Network,
    words: Sequence[str],
    log: Path,
    script: str = "train.py",
    slots: int = 1,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Launch]:
    """``deepspeed --hostfile hosts <options> launch/<script> <words>``, started; what is left of it at the end is killed.

    environment: more lines for DeepSpeed's ``.deepspeed_env``.
    """
    settings = log.with_suffix(".env")
    settings.write_text("".join(f"{key}={value}\n" for key, value in rank_environment(network, environment).items()))
    own = {
        **os.environ,
        "DS_ENV_FILE": str(settings),
        "DS_ACCELERATOR": "cpu",
        "PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=5 -o ServerAliveCountMax=3",
    }
    command = ["deepspeed", "--hostfile", str(network.hostfile(slots)), *options, str(ROOT / "launch" / script), *words]
    with log.open("wb") as file:
        process = network.hosts[0].start(command, own, stdout=file, stderr=file, start_new_session=True)
    try:
        yield Launch(network, process, log)
    finally:
        for host in network.hosts:
            host.kill_launched()
        process.kill()
        process.wait()


def rank_environment(network: Network, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """What ranks on CPUs need, and ``more``."""
    return {
        "PATH": os.environ["PATH"],
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
        "TMPDIR": str(network.local),
        "PYTHONPATH": str(ROOT),
        **{key: value for key, value in os.environ.items() if key == "TORCH_EXTENSIONS_DIR"},
        **(more or {}),
    }
