"""SIGTERM, by which schedulers and DeepSpeed's launcher end a rank: a wish to stop, or the news that another rank has died.

A scheduler that takes a machine back sends SIGTERM and waits: the update in hand is finished, a checkpoint written, and every
rank exits with EXIT_PREEMPTED. DeepSpeed's launcher sends it to the ranks that are left when one has died; they can finish
nothing, and end at once, naming the dead one.

Only a thread can act then: Python's handlers wait for the main thread, which may be inside a collective that never ends.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from deepspeed import comm
from torch.distributed import DistError

from agvm_ds.checkpoints import NotWrittenError
from agvm_ds.config import ConfigError
from agvm_ds.mmdet.process.errors import EXIT_RANK_DIED, HostLost, RankDied

EXIT_PREEMPTED = 143
"""As a shell says of a process that SIGTERM ended: 128 + 15."""
_ASKED_EVERY = 10
"""Batches of an evaluation."""
_GRACE = 2.0
"""Seconds in which a rank that closed its connections becomes a dead process."""


class StopAsked(Exception):
    """Any rank was sent SIGTERM while the ranks evaluated."""


class Preempted(SystemExit):
    """The run stops because it was asked to; everything is saved."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


@dataclass(frozen=True)
class Peer:
    """Another rank."""

    rank: int
    place: str
    """Where its process can be seen: see ``this_place``."""
    pid: int
    started: float

    def gone(self) -> bool:
        """Whether it was on this host, and its process has ended."""
        if self.place != this_place():
            return False
        try:
            process = psutil.Process(self.pid)
            return process.create_time() != self.started or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


def this_place() -> str:
    """The same for processes that see each other, whatever their hosts are called: this system, and the container in it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


class RankWatch:
    """Knows which ranks of this host live; every rank must make one at once.

    stops: listen for SIGTERM from now on, and ask ``stop_asked`` between updates; else it ends the process, as ever.
    on_death: called in a thread when SIGTERM came for the death of others.
    """

    def __init__(self, on_death: Callable[[RankDied], None], stops: bool = True) -> None:
        self._on_death = on_death
        self._asked = threading.Event()
        self._stopping = False
        self._heard: bool | None = None
        me = psutil.Process()
        mine = Peer(comm.get_rank(), this_place(), me.pid, me.create_time())
        found: list[Any] = [None] * comm.get_world_size()
        torch.distributed.all_gather_object(found, mine)
        self._peers: list[Peer] = [peer for peer in found if peer != mine]
        if stops:
            self._listen()

    def _listen(self) -> None:
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.signal(signal.SIGTERM, _left_to_the_thread)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(read,), name="SIGTERM", daemon=True).start()
        os.register_at_fork(before=_hold_back, after_in_parent=_let_through, after_in_child=_end_with_parent)

    def _hear(self, read: int) -> None:
        while byte := os.read(read, 1):
            if byte[0] != signal.SIGTERM or self._stopping:
                continue
            if dead := self.dead(0.0):
                self._on_death(RankDied(dead))
                os._exit(EXIT_RANK_DIED)
            self._asked.set()  # it may come twice: from the scheduler, and from the launcher that got it too

    def dead(self, grace: float = _GRACE) -> list[int]:
        """Ranks of this host whose process has ended."""
        end = time.monotonic() + grace
        while not (found := [peer.rank for peer in self._peers if peer.gone()]) and time.monotonic() < end:
            time.sleep(0.05)
        return found

    @property
    def asked(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._asked.is_set()

    def hear_of(self, anyone: bool) -> None:
        """What the ranks have told each other, along with their losses, of who was asked; it answers ``stop_asked`` once."""
        self._heard = anyone or bool(self._heard)

    def stop_asked(self, device: torch.device | str) -> bool:
        """Whether any rank was asked to stop; every rank must call it, and all get the same answer."""
        heard, self._heard = self._heard, None
        if heard is None:
            flag = torch.tensor(float(self.asked), device=device)
            comm.all_reduce(flag)
            heard = bool(flag.item() > 0)
        self._stopping = heard
        return heard

    def listening(self, batches: Iterable[Any], device: torch.device | str) -> Iterator[Any]:
        """The batches of an evaluation, of which each rank has as many; raises StopAsked on all ranks between two.

        Not between any two: the ranks wait for each other to ask, and one image takes another time than the next.
        """
        for done, batch in enumerate(batches, 1):
            yield batch
            if done % _ASKED_EVERY == 0 and self.stop_asked(device):
                raise StopAsked
        if self.stop_asked(device):
            raise StopAsked

    @contextmanager
    def naming_the_dead(self) -> Iterator[None]:
        """Raise RankDied in the place of what a rank's death causes on the others: a collective that fails.

        Where none of this host died, and there are others, the collective's failure is a HostLost.
        """
        try:
            yield
        except Exception as error:
            # A mistake of the user's is told as such; a checkpoint that cannot be written may be a rank's death, though.
            if (isinstance(error, NotWrittenError) or not isinstance(error, ConfigError)) and (dead := self.dead()):
                raise RankDied(dead) from error
            if (reason := unanswered(error)) and any(peer.place != this_place() for peer in self._peers):
                raise HostLost(reason) from error
            raise


def unanswered(error: Exception) -> str | None:
    """What gloo or NCCL says when another rank does not answer; None for any other error."""
    line = str(error).strip().split("\n")[0]
    if not isinstance(error, DistError) and not _GLOO.match(line):
        return None
    return _GLOO.sub("", line).split(". This is typically")[0]


_GLOO = re.compile(r"\[\S*gloo/\S*\] *")
"""How gloo's errors begin, which have no class of their own: where in its sources they were raised."""


def _left_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Python wants a handler; the thread has heard it."""


_before = threading.local()
"""``mask``: the signals that a forking thread blocked already."""


def _hold_back() -> None:
    """Before a fork: SIGTERM to the child waits until the child hears it; a pool that ends may send it at once."""
    _before.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _let_through() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _before.mask)


def _end_with_parent() -> None:
    """In what a rank has forked (data workers, mmdet's pools): only the rank's own SIGTERM ends it, as Python sends it.

    The launcher sends SIGTERM to all processes, and what the rank has in hand needs them. The pipe of both is the rank's.
    """
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_by, args=(os.getppid(),), daemon=True).start()


def shield_workers(loader: Any) -> None:
    """The same for a loader's workers, which a config may want to be spawned."""
    loader.worker_init_fn = partial(_shielded, loader.worker_init_fn)


def _shielded(initialize: Callable[[int], None] | None, worker: int) -> None:
    """In a worker; a function of a module, for what a spawned one begins with is pickled."""
    if signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        _end_with_parent()
    if initialize is not None:
        initialize(worker)


def _end_by(parent: int) -> None:
    """End this process when its parent sends SIGTERM, which is blocked for all others."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
