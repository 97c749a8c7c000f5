"""RankWatch over real ranks: who has died, and whether anybody was asked to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import comm
from torch.utils.data import DataLoader

from agvm_ds.checkpoints import CheckpointError, NotWrittenError
from agvm_ds.config import ConfigError
from agvm_ds.mmdet.process import signals
from agvm_ds.mmdet.process.errors import HostLost, RankDied
from agvm_ds.mmdet.process.signals import RankWatch, StopAsked, shield_workers, this_place, unanswered
from tests.launch import run_ranks


def one_is_asked() -> list[bool]:
    """In a rank: rank 1 gets SIGTERM, twice; all hear of it at the next update, and not before."""
    watch = RankWatch(lambda error: None)
    heard = [watch.stop_asked("cpu")]
    if comm.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    return [*heard, watch.stop_asked("cpu")]


def heard_along_with_losses() -> list[bool]:
    """In a rank: of two micro-batches the first had news; it answers once, and then the ranks ask each other again."""
    watch = RankWatch(lambda error: None)
    watch.hear_of(True)
    watch.hear_of(False)
    return [watch.stop_asked("cpu"), watch.stop_asked("cpu")]


def test_what_was_heard_along_with_the_losses_is_the_answer_once(tmp_path: Path) -> None:
    assert run_ranks(heard_along_with_losses, 2, tmp_path) == [[True, False]] * 2


def test_all_ranks_hear_that_one_was_asked_to_stop(tmp_path: Path) -> None:
    assert run_ranks(one_is_asked, 2, tmp_path) == [[False, True]] * 2


def forks() -> list[Any]:
    """In a rank: how a stranger's SIGTERM, and then its own, ends what it has forked, and what it hears of both."""
    watch = RankWatch(lambda error: None)
    if (child := os.fork()) == 0:
        time.sleep(60)
        os._exit(3)
    time.sleep(0.5)
    subprocess.run(["kill", "-TERM", str(child)], check=True)
    time.sleep(0.5)
    lives = os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    return [lives, os.waitstatus_to_exitcode(status), watch.asked, watch.stop_asked("cpu")]


def test_what_a_rank_has_forked_ends_by_that_rank_alone_which_is_not_asked_to_stop(tmp_path: Path) -> None:
    """mmdet's VOC evaluation leaves a pool of processes, which Python ends so; a launch is stopped with all its processes."""
    assert run_ranks(forks, 1, tmp_path, timeout=100) == [[True, 0, False, False]]


def forks_and_ends() -> list[Any]:
    """In a rank: how children end that it ends as soon as they are there, and what it hears itself, then and afterwards."""
    watch = RankWatch(lambda error: None)
    codes = []
    for _ in range(20):
        if (child := os.fork()) == 0:
            time.sleep(20)
            os._exit(3)
        os.kill(child, signal.SIGTERM)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    heard = watch.asked
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    return [codes, heard, watch.asked]


def test_a_child_that_has_hardly_begun_ends_too(tmp_path: Path) -> None:
    """mmdet's VOC evaluation ends a pool at once when it has little to do; the rank waited for it forever."""
    assert run_ranks(forks_and_ends, 1, tmp_path, timeout=100) == [[[0] * 20, False, True]]


def evaluates(batches: int, asked_at: int) -> list[Any]:
    """In a rank: the batches that it saw of an evaluation in which rank 1 is asked to stop, and whether it was broken off."""
    watch = RankWatch(lambda error: None)
    seen = []
    try:
        for batch in watch.listening(range(batches), "cpu"):
            seen.append(batch)
            if batch == asked_at and comm.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.5)
    except StopAsked:
        return [len(seen), True]
    return [len(seen), False]


@pytest.mark.parametrize(("asked_at", "seen"), [(3, [10, True]), (10, [14, True]), (99, [14, False])])
def test_an_evaluation_asks_now_and_then_and_at_its_end(asked_at: int, seen: list[Any], tmp_path: Path) -> None:
    assert run_ranks(evaluates, 2, tmp_path, 14, asked_at) == [seen] * 2


def left_alone(place: Path) -> Any:
    """In a rank: rank 1 ends; rank 0 sees what of its own errors that explains."""
    told: list[str] = []
    watch = RankWatch(lambda error: told.append(str(error)))
    assert watch.dead(0.0) == []
    with pytest.raises(RuntimeError, match="a bug"), watch.naming_the_dead():
        raise RuntimeError("a bug")
    comm.barrier()
    if comm.get_rank() == 1:
        (place / "result_1").write_bytes(b"N.")
        os._exit(0)
    found = []
    for error in (
        RuntimeError("closed"),
        NotWrittenError("closed"),
        CheckpointError("mistake"),
        ConfigError("mistake"),
    ):
        try:
            with watch.naming_the_dead():
                raise error
        except Exception as seen:
            found.append(type(seen))
    return found, watch.dead()


def test_an_error_that_a_death_caused_names_the_dead_and_a_mistake_stays_one(tmp_path: Path) -> None:
    found, dead = run_ranks(left_alone, 2, tmp_path, tmp_path / "ranks_0")[0]
    assert found == [RankDied, RankDied, CheckpointError, ConfigError]
    assert dead == [1]


def on_another_host(place: Path) -> Any:
    """In a rank: rank 1 is on a host of the same name, and ends; what rank 0 makes of the errors it then sees."""
    if comm.get_rank() == 1:
        signals.this_place = lambda: "another"  # type: ignore[assignment]
    watch = RankWatch(lambda error: None)
    if comm.get_rank() == 1:
        (place / "result_1").write_bytes(b"N.")
        os._exit(0)
    found = []
    for provoke in (lambda: [comm.barrier() for _ in range(2)], lambda: {}["a bug"]):
        try:
            with watch.naming_the_dead():
                provoke()
        except Exception as error:
            found.append((type(error), str(error)))
    return found, watch.dead()


def test_a_host_that_is_lost_is_no_dead_rank_of_this_one_though_it_has_its_name(tmp_path: Path) -> None:
    (lost, bug), dead = run_ranks(on_another_host, 2, tmp_path, tmp_path / "ranks_0")[0]
    assert lost[0] is HostLost
    assert "another host is lost (" in lost[1] and "gloo" not in lost[1]
    assert bug[0] is KeyError
    assert dead == []


def test_only_an_error_of_communication_is_a_lost_host() -> None:
    said = (
        "[/pytorch/gloo/transport/tcp/pair.cc:545] Read error [10.0.0.2]:1: Connection reset by peer. This is typically"
    )
    assert unanswered(RuntimeError(said)) == "Read error [10.0.0.2]:1: Connection reset by peer"
    assert unanswered(torch.distributed.DistNetworkError("broken")) == "broken"
    assert unanswered(RuntimeError("shape [3] is not [4]")) is None
    assert this_place() == this_place()


def waits(place: Path) -> None:
    """In a rank: rank 1 ends, and rank 0, which waits in C, is sent SIGTERM as the launcher does it."""
    RankWatch(lambda error: (place / "told").write_text(str(error)) and None)
    comm.barrier()
    if comm.get_rank() == 0:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        threading.Lock().acquire() and _forever()
    os._exit(0)


def _forever() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()  # no signal handler of Python's runs until it is released


def test_sigterm_after_a_death_ends_a_rank_that_waits_in_a_collective(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(AssertionError, match=r"exit code 1|No such file"):
        run_ranks(waits, 2, tmp_path, tmp_path, timeout=60)
    assert time.monotonic() - begin < 30
    assert "rank 1 has died" in (tmp_path / "told").read_text()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_workers_outlive_the_launchers_sigterm_and_end_with_their_rank(method: str) -> None:
    """mmdet's ``mp_start_method`` says how they start."""
    loader = DataLoader(range(100), num_workers=1, multiprocessing_context=method)  # type: ignore[arg-type]
    shield_workers(loader)
    items = iter(loader)
    assert next(items).item() == 0
    (worker,) = items._workers  # type: ignore[attr-defined]
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    assert [item.item() for item in items] == list(range(1, 100))
    items = iter(loader)
    next(items)
    (worker,) = items._workers  # type: ignore[attr-defined]
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
