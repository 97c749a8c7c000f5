"""How a launch ends when something is wrong with what the user gave: one message, a non-zero exit everywhere.

Any rank may find a mistake first, and DeepSpeed's launcher kills the ranks of a host as soon as one of them has ended. So the
first to find it tells it, and the others end only when it has been told.
"""

from __future__ import annotations

import io
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from torch.distributed import DistError, TCPStore

from agvm_ds.config import ConfigError

EXIT_RANK_DIED = 1
EXIT_BAD_INPUT = 2
PATIENCE = 15.0
"""Seconds that a host waits for the host of rank 0 to tell, and that one for the others to hear it."""
_TOLD, _HEARD = "agvm_ds/told", "agvm_ds/heard"
_CLAIM, _DONE = "agvm_ds-mistake", "told"


class HostError(ConfigError):
    """A mistake that only one host may see (a missing file, a folder that cannot be written)."""


class RanksLost(RuntimeError):
    """This rank cannot go on without others that it lost."""


class RankDied(RanksLost):
    """Other ranks of this host have ended without a word to the rest."""

    def __init__(self, ranks: Sequence[int]) -> None:
        which = f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} have"
        super().__init__(
            f"{which} died: killed (by the system, when memory ran out?), or ended with the message above. What is after "
            "the last checkpoint is lost; --resume continues from there"
        )


class HostLost(RanksLost):
    """A rank of another host has ended, or does not answer."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"another host is lost ({reason}): its ranks have ended, and its own output says why, or the network is cut. "
            "What is after the last checkpoint is lost; --resume continues from there"
        )


def main_of_rank(main: Callable[[], None]) -> None:
    """Run ``main``; a ConfigError is told once for the launch (a HostError once a host), and every rank exits with 2.

    When a rank dies, the others of its host name it once, and exit with 1; so do those of other hosts, which only know that
    it does not answer.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every terminal has a Φ, and no run ends for want of one
    try:
        main()
    except ConfigError as error:
        tell_once(f"error: {error}", every_host=isinstance(error, HostError))
        sys.exit(EXIT_BAD_INPUT)
    except RanksLost as error:
        tell_lost(error)
        sys.stdout.flush()
        os._exit(
            EXIT_RANK_DIED
        )  # an ordinary exit closes connections, and can wait minutes for those that do not answer


def tell_lost(error: RanksLost) -> None:
    """Say what was lost, in one of the ranks that are left on this host."""
    tell_once(f"error: {error}", every_host=True)


def tell_once(message: str, every_host: bool, patience: float = PATIENCE) -> None:
    """Print a message that several ranks have, in one of them; return when it has been told.

    every_host: print it on each host that has it. Otherwise a host waits for rank 0's to tell it, and tells it itself
    when that one does not within ``patience`` seconds.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        print(message, file=sys.stderr, flush=True)
        return
    host, hosts = _place(os.environ)
    claim = _claim_file(host)
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        if _until(lambda: claim.read_text() == _DONE, time.monotonic() + 3 * patience):
            return
    if every_host or hosts == 1 or host == 0 or not _told_by_rank_zero(patience):
        print(message, file=sys.stderr, flush=True)
    if host == 0 and hosts > 1 and not every_host:
        _tell_other_hosts(hosts - 1, patience)
    claim.write_text(_DONE)


def _place(environ: Mapping[str, str]) -> tuple[int, int]:
    """(this host's number, hosts of the launch), as DeepSpeed's launcher or torchrun says."""
    host = environ.get("CROSS_RANK") or environ.get("GROUP_RANK") or "0"
    return int(host), int(environ.get("CROSS_SIZE") or environ.get("GROUP_WORLD_SIZE") or "1")


def _claim_file(host: int) -> Path:
    """The same file for the ranks of one launch on one host, for they have one parent; those of ended parents are removed."""
    folder, parent = Path(tempfile.gettempdir()), os.getppid()
    for old in folder.glob(f"{_CLAIM}-{os.getuid()}-*"):
        if not psutil.pid_exists(int(old.name.split("-")[3])):
            old.unlink(missing_ok=True)
    started = int(psutil.Process(parent).create_time())
    return folder / f"{_CLAIM}-{os.getuid()}-{parent}-{started}-{os.environ.get('MASTER_PORT', '')}-{host}"


def _told_by_rank_zero(patience: float) -> bool:
    end = time.monotonic() + patience
    try:
        # TCPStore's own attempts to connect fill the terminal.
        if not _until(_served, end):
            return False
        store = _store(False, patience)
        if not _until(lambda: store.check([_TOLD]), end):
            return False
        store.add(_HEARD, 1)
    except DistError:
        return False
    return True


def _tell_other_hosts(others: int, patience: float) -> None:
    """Serve the news until the other hosts have heard it, or for ``patience`` seconds: then they tell it themselves."""
    end = time.monotonic() + patience
    with suppress(DistError):
        store = _store(not _served(), patience)
        store.set(_TOLD, "1")
        _until(lambda: store.add(_HEARD, 0) >= others, end)


def _store(serve: bool, patience: float) -> TCPStore:
    """A store at the launch's address: rank 0's when its process group is there already, else one that serves now."""
    address, port = _address()
    return TCPStore(address, port, None, serve, timedelta(seconds=patience), wait_for_workers=False)


def _address() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _served() -> bool:
    try:
        with socket.create_connection(_address(), timeout=1):
            return True
    except OSError:
        return False


def _until(true: Callable[[], bool], end: float) -> bool:
    """Whether ``true`` came true before ``end`` of the monotonic clock."""
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
