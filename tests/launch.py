"""Start ranks for a test: one way for all of them.

Without a GPU children are forked from a clean server process that has imported torch and deepspeed once, so that a test
pays for its ranks and not for their imports. Rendezvous is a file, so no port can be taken.

With DS_ACCELERATOR=cuda all ranks of a test share the first GPU, over NCCL, each as a host of its own: NCCL refuses two
ranks of one host on one GPU. They are then started afresh, for a process that has looked at a GPU must not be forked.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
ON_GPU = os.environ["DS_ACCELERATOR"] == "cuda"
CONTEXT: Any = multiprocessing.get_context("spawn" if ON_GPU else "forkserver")
if not ON_GPU:
    CONTEXT.set_forkserver_preload(["tests.standins", "tests.preload"])


class RankFailure(AssertionError):
    """A rank ended with an exception: which one, and its traceback."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    tmp_path: Path,
    *args: Any,
    timeout: float = 240,
    local_size: int | None = None,
) -> list[Any]:
    """Call ``function(*args)`` in ``world_size`` ranks of a group; return what each returned, by rank.

    local_size: how many ranks DeepSpeed takes a host to have; all, unless given, and then it sums in shared memory. On a GPU
    each is a host.

    Raises RankFailure with the first failing rank's traceback, or when a rank does not end in ``timeout`` seconds; the
    others are killed then.
    """
    place = Path(tmp_path) / f"ranks_{len(list(Path(tmp_path).glob('ranks_*')))}"
    place.mkdir(parents=True)
    ranks = [
        CONTEXT.Process(
            target=_rank, args=(function, args, rank, world_size, local_size or world_size, str(place)), daemon=True
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        _wait(ranks, place, timeout)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return [pickle.loads((place / f"result_{rank}").read_bytes()) for rank in range(world_size)]


def _wait(ranks: list[Any], place: Path, timeout: float) -> None:
    running = {process.sentinel: rank for rank, process in enumerate(ranks)}
    while running:
        ended = wait(list(running), timeout)
        if not ended:
            raise RankFailure(f"ranks {sorted(running.values())} did not end in {timeout} s")
        for sentinel in ended:
            rank = running.pop(sentinel)  # type: ignore[index]
            error = place / f"error_{rank}"
            if error.exists() or ranks[rank].exitcode:
                text = error.read_text() if error.exists() else f"exit code {ranks[rank].exitcode}"
                raise RankFailure(f"rank {rank} of {len(ranks)} failed:\n{text}")


def _rank(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, local_size: int, place: str
) -> None:
    set_rank(rank, world_size, local_size)
    import deepspeed

    try:
        deepspeed.init_distributed(
            "nccl" if ON_GPU else "gloo",
            auto_mpi_discovery=False,
            init_method=f"file://{place}/rendezvous",
            rank=rank,
            world_size=world_size,
        )
        deepspeed.comm.barrier()  # a rank that ends before another has connected to it would break that one's start
        result = function(*args)
        (Path(place) / f"result_{rank}").write_bytes(pickle.dumps(result))
    except BaseException:
        (Path(place) / f"error_{rank}").write_text(traceback.format_exc())
        raise


def set_rank(rank: int, world_size: int, local_size: int) -> None:
    """The variables by which DeepSpeed and NCCL know a rank and its host."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    if ON_GPU:
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
        os.environ |= {"NCCL_HOSTID": f"host of rank {rank}", "NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo"}
    else:
        os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_SIZE": str(local_size)}


_PORTS = iter(random.SystemRandom().sample(range(20000, 32000), 12000))
"""Below those that the system gives to anybody, and none twice: what a launch leaves behind has its port's name."""


def free_port() -> int:
    """A TCP port of this machine that nobody uses now."""
    for port in _PORTS:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free")


@contextmanager
def launch_port() -> Iterator[int]:
    """A free port for a launch. DeepSpeed leaves 66 MB a rank in shared memory under the port's name: removed afterwards."""
    port = free_port()
    try:
        yield port
    finally:
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            buffer.unlink(missing_ok=True)


def until(true: Callable[[], bool], seconds: float) -> None:
    """Wait until something is true. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.05)
