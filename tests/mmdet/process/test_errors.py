"""One message a launch, from whichever rank is there to tell it; the others do not end before it is told."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from agvm_ds.mmdet.process.errors import main_of_rank
from tests.launch import free_port

PROGRAM = """
import os, sys, time
from agvm_ds.mmdet.process.errors import ConfigError, HostError, main_of_rank

def main():
    time.sleep(float(os.environ["DELAY"]))
    raise {kind}("it is wrong")

print("started", flush=True)
sys.stdin.readline()
main_of_rank(main)
"""
ROOT = Path(__file__).parents[3]


def start(rank: int, kind: str, delay: float, **environ: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(kind=kind)],
        env={**os.environ, "RANK": str(rank), "DELAY": str(delay), **{k: str(v) for k, v in environ.items()}},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcomes(ranks: list[subprocess.Popen[str]]) -> list[tuple[int, str, float]]:
    """(exit code, what was told, seconds) of each, started together once all have imported what they need."""
    for process in ranks:
        assert process.stdout is not None and process.stdout.readline() == "started\n"
    for process in ranks:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    begin, ended = time.monotonic(), dict[int, float]()
    while len(ended) < len(ranks) and time.monotonic() < begin + 60:
        for index, process in enumerate(ranks):
            if process.poll() is not None:
                ended.setdefault(index, time.monotonic() - begin)
        time.sleep(0.02)
    return [(p.wait(1), p.communicate()[1].strip(), ended[i]) for i, p in enumerate(ranks)]


def host(number: int, hosts: int, port: int) -> dict[str, Any]:
    return {"CROSS_RANK": number, "CROSS_SIZE": hosts, "WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def test_the_first_rank_tells_when_rank_zero_is_late() -> None:
    """DeepSpeed's launcher would kill rank 0 within a second of rank 1's silent end."""
    place = host(0, 1, free_port())
    late, first = outcomes([start(0, "ConfigError", 2.0, **place), start(1, "ConfigError", 0.0, **place)])
    assert first[:2] == (2, "error: it is wrong") and first[2] < 1.5
    assert late[:2] == (2, "")


def test_ranks_together_tell_once_and_nobody_ends_untold() -> None:
    place = host(0, 1, free_port())
    found = outcomes([start(rank, "ConfigError", 0.0, **place) for rank in range(3)])
    assert [code for code, _, _ in found] == [2, 2, 2]
    assert sorted(said for _, said, _ in found) == ["", "", "error: it is wrong"]


@pytest.mark.parametrize(("kind", "told"), [("ConfigError", ["error: it is wrong", ""]), ("HostError", None)])
def test_several_hosts_tell_it_once_and_a_mistake_of_a_host_on_each(kind: str, told: list[str] | None) -> None:
    """Host 0 is late by more than a moment; host 1 waits for it, unless the mistake may be its own."""
    port = free_port()
    found = outcomes([start(0, kind, 1.5, **host(0, 2, port)), start(2, kind, 0.0, **host(1, 2, port))])
    assert [said for _, said, _ in found] == (told or ["error: it is wrong"] * 2)
    assert [code for code, _, _ in found] == [2, 2]


def test_a_host_tells_what_rank_zero_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0's host is content, or gone: the other one's patience ends."""
    from agvm_ds.mmdet.process import errors

    said: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *text, **_: said.extend(text))
    for key, value in host(1, 2, free_port()).items():
        monkeypatch.setenv(key, str(value))
    begin = time.monotonic()
    errors.tell_once("error: only here", every_host=False, patience=0.5)
    assert said == ["error: only here"]
    assert 0.4 < time.monotonic() - begin < 5


def test_a_terminal_without_the_letter_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that had trained to its end once ended with 1: its table has a Φ."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    main_of_rank(lambda: print("variance Φ", flush=True))
    assert written.getvalue() == b"variance ?\n"
