"""``deepspeed --hostfile`` on hosts with their own network, processes and shared memory.

Two hosts of a rank each, or three, end with the scale factors, weights and evaluations of as many ranks on one host, bit for
bit: gloo's ring adds up in the order of the ranks, wherever they are. (DeepSpeed's all-reduce in shared memory, which one
host alone can use, is for inference: training does not call it.)

``make test-hosts`` runs all of it, and prints the table of what was lost.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from agvm_ds.mmdet.process.signals import this_place
from tests.faults.processes import config_lines
from tests.faults.runs import EPOCH, Runs, published
from tests.faults.table import survived
from tests.hosts.launching import LIMIT, Launch, launched, rank_environment
from tests.hosts.namespaces import SUBNET, Network, network
from tests.trainer import DEMO_CONFIG, ROOT, cfg_options, data_options

EXTENDED = pytest.mark.extended
EXIT_PREEMPTED = 143
ONE_MINUTE = {"DEEPSPEED_TIMEOUT": "1"}
UPDATE = EPOCH + 2
"""Where faults happen: two after the checkpoint of epoch 1."""
SOON = 120
"""Seconds in which all hosts' launches have ended after a fault that a connection tells; measured on an idle machine: 6."""


def train(hosts: Network, runs: Runs, work: Path, *more: str, **settings: Any) -> str:
    """A launch that goes through; what the terminal showed."""
    with _train(hosts, runs, work, "", *more, **settings) as launch:
        code = launch.wait()
    assert code == 0, launch.output
    return launch.output


@contextmanager
def _train(
    hosts: Network,
    runs: Runs,
    work: Path,
    fault: str,
    *more: str,
    slots: int = 1,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    **settings: Any,
) -> Iterator[Launch]:
    log = runs.place / f"{work.name}_{len(list(runs.place.glob('*.log')))}.log"
    words = runs.words(work, fault, *more, **settings)
    with launched(hosts, words, log, slots=slots, options=options, environment=environment) as launch:
        yield launch


@contextmanager
def waiting(hosts: Network, runs: Runs, work: Path, *more: str, **options: Any) -> Iterator[Launch]:
    """A launch whose ranks wait in UPDATE until the end of the context."""
    waits, until = (runs.place / f"{work.name}.{word}" for word in ("waits", "until"))
    fault = config_lines("Waiting", update=UPDATE, waits=str(waits), until=str(until))
    with _train(hosts, runs, work, fault, *more, **options) as launch:
        launch.reaches(waits)
        launch.begin = time.monotonic()
        yield launch
        until.touch()
        launch.wait()


def test_two_hosts_end_as_one_host_does(two: Network, runs: Runs) -> None:
    work = runs.place / "both"
    train(two, runs, work)
    survived("none: two hosts of one rank", "as two ranks of one host", runs.lost(work))


def test_a_hosts_ranks_are_killed(two: Network, runs: Runs) -> None:
    """The other host's end soon, and say what they know; a resume on both hosts loses nothing."""
    work = runs.place / "killed"
    with waiting(two, runs, work) as launch:
        two.hosts[1].ranks()[0].kill()
    assert launch.process.returncode != 0
    assert launch.seconds < SOON, launch.output
    assert launch.output.count("error: ") == 1, launch.output
    assert "alpha: error: another host is lost (" in launch.output
    assert "Traceback" not in launch.output
    resumed = train(two, runs, work, "--resume")
    assert f"at update {EPOCH}," in resumed
    survived("SIGKILL of a host's ranks", f"all ended in {launch.seconds:.0f} s; --resume", runs.lost(work))


def test_a_container_of_the_same_name_is_another_place(allowed: None) -> None:
    """Its processes cannot be seen, and their numbers are others' here."""
    program = "from agvm_ds.mmdet.process.signals import this_place; print(this_place())"
    printed = [
        subprocess.run([*words, sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
        for words in ([], ["unshare", "--pid", "--fork"])
    ]
    here, there = (process.stdout.strip() for process in printed)
    assert here == this_place() != there


@EXTENDED
def test_one_of_a_hosts_ranks_is_killed(two: Network, runs: Runs) -> None:
    """Its own host names it, the other says that it lost a host."""
    work = runs.place / "killed_one"
    with waiting(two, runs, work, slots=2, train_batch_size=16) as launch:
        two.hosts[1].ranks()[1].kill()
    assert launch.process.returncode != 0
    assert launch.seconds < SOON, launch.output
    assert "beta: error: rank 3 has died" in launch.output, launch.output
    assert "alpha: error: another host is lost (" in launch.output
    assert launch.output.count("error: ") == 2, "one message a host"


@EXTENDED
def test_the_cable_of_a_host_is_out(two: Network, runs: Runs) -> None:
    """No packet tells anybody: DEEPSPEED_TIMEOUT, here one minute, ends both hosts; ssh's ServerAliveInterval the command."""
    work = runs.place / "cut"
    options = ["--enable_each_rank_log", str(two.local / "logs")]
    with ExitStack() as cable, waiting(two, runs, work, options=options, environment=ONE_MINUTE) as launch:
        cable.enter_context(two.cut(two.hosts[1]))
    assert launch.process.returncode != 0
    assert 55 < launch.seconds < 60 + SOON, launch.output
    for host in two.hosts:
        (log,) = (host.disk / "logs").glob("*_rank*.log")
        assert log.read_text().count("error: another host is lost (Timed out waiting 60000ms") == 1, log.read_text()
        assert "Traceback" not in log.read_text()
    train(two, runs, work, "--resume")
    survived("a host's cable out", f"all ended in {launch.seconds:.0f} s (limit 60); --resume", runs.lost(work))


@EXTENDED
def test_ctrl_c_on_the_first_host_saves(two: Network, runs: Runs) -> None:
    """DeepSpeed's launcher lets pdsh end, and its launchers on all hosts by name: their ranks finish the update and save."""
    work = runs.place / "interrupted"
    with waiting(two, runs, work) as launch:
        launch.interrupt()
        launch.process.wait(30)
    assert launch.seconds < SOON, launch.output
    assert (work / "deepspeed/latest").read_text() == f"update_{UPDATE + 1}", launch.output
    (log,) = work.glob("*.log")
    assert f"stopped by SIGTERM after update {UPDATE}" in log.read_text(), "the terminal's connection is gone by then"
    train(two, runs, work, "--resume")
    survived("Ctrl-C on the first host", f"saved on all in {launch.seconds:.0f} s; --resume", runs.lost(work))


@EXTENDED
def test_a_scheduler_takes_back_one_host(two: Network, runs: Runs) -> None:
    work = runs.place / "taken_back"
    with _train(two, runs, work, config_lines("Terminated", rank=1, update=UPDATE)) as launch:
        code = launch.wait()
    assert code == EXIT_PREEMPTED, launch.output
    assert f"stopped by SIGTERM after update {UPDATE}" in launch.output
    assert launch.output.count(f"exited with exit code {EXIT_PREEMPTED}") == 2, "on both hosts"
    train(two, runs, work, "--resume")
    survived("SIGTERM to one host's rank", f"all saved, exit {code}; --resume", runs.lost(work))


@EXTENDED
def test_a_host_that_cannot_be_reached_at_the_start(two: Network, runs: Runs) -> None:
    with two.cut(two.hosts[1]), _train(two, runs, runs.place / "alone", "", environment=ONE_MINUTE) as launch:
        code = launch.wait()
    assert code != 0
    assert launch.seconds < 60 + SOON, launch.output
    assert f"alpha: error: the ranks did not all meet at {SUBNET}.1:29500" in launch.output, launch.output
    assert "within 0:01:00 (DEEPSPEED_TIMEOUT, minutes)" in launch.output


@EXTENDED
def test_without_ssh_each_host_is_told_its_number(two: Network, runs: Runs) -> None:
    """As containers and schedulers start them."""
    work = runs.place / "no_ssh"
    words = ["deepspeed", "--hostfile", str(two.hostfile(1)), "--no_ssh", "--master_addr", f"{SUBNET}.1"]
    command = [str(ROOT / "launch/train.py"), *runs.words(work, "")]
    started = [
        host.start([*words, "--node_rank", str(number), *command], {**os.environ, **rank_environment(two)})
        for number, host in enumerate(two.hosts)
    ]
    assert [process.wait(LIMIT) for process in started] == [0, 0]
    survived("none: --no_ssh on two hosts", "as two ranks of one host", runs.lost(work))


@EXTENDED
def test_what_one_host_lacks_ends_all(two: Network, runs: Runs) -> None:
    shutil.copy(runs.place / "whole/latest.pth", two.hosts[0].disk / "start.pth")
    work = runs.place / "lacking"
    start = str(two.local / "start.pth")
    with _train(two, runs, work, "", "--load-from", start) as launch:
        code = launch.wait()
    assert code == 2, launch.output
    assert launch.seconds < SOON
    assert f"alpha: error: on beta: --load-from: not found: {start}" in launch.output
    assert "Traceback" not in launch.output


@EXTENDED
def test_each_host_makes_the_demos_data_and_launch_test_measures_on_both(two: Network, runs: Runs) -> None:
    digits = two.local / "digits"
    words = [str(DEMO_CONFIG), str(runs.place / "whole/latest.pth")]
    words += cfg_options({"data_root": digits, **data_options(digits)})
    with launched(two, words, runs.place / "test.log", "test.py") as launch:
        code = launch.wait()
    assert code == 0, launch.output
    assert "bbox_mAP" in launch.output
    for host in two.hosts:
        assert sorted(path.name for path in host.disk.glob("*digits*")) == ["digits"], "and no draft"
        assert (host.disk / "digits/dataset.json").is_file()


@EXTENDED
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_work_dir_on_each_host(stage: int, two: Network, runs: Runs) -> None:
    """Each host has its own ranks' files; rank 0's alone has logs and published weights; a resume finds them."""
    settings, whole = {"zero_optimization": {"stage": stage}}, f"whole_{stage}"
    assert runs.go(runs.place / whole, **settings).good
    work = two.local / f"own_{stage}"
    with waiting(two, runs, work, "--keep", "1", **settings) as launch:
        two.hosts[0].ranks()[0].kill()
    assert launch.seconds < SOON, launch.output
    output = train(two, runs, work, "--resume", "--keep", "1", **settings)
    assert f"at update {EPOCH}," in output
    assert "each host has a work dir of its own" in output
    alpha, beta = (host.disk / work.name for host in two.hosts)
    for disk in (alpha, beta):
        assert [path.name for path in (disk / "deepspeed").iterdir() if path.is_dir()] == ["epoch_3"]
    assert published(alpha) == ["epoch_3.pth"]
    assert {path.name for path in beta.iterdir()} == {"deepspeed", ".lock"}
    _names_the_folder_and_takes_one_that_all_share(runs, alpha, beta, settings)
    shutil.copytree(runs.place / whole, copy := runs.place / f"{whole}_kept")
    for old in ("epoch_1.pth", "epoch_2.pth"):
        (copy / old).unlink(missing_ok=True)
    survived(f"a work dir on each host, ZeRO-{stage}", "killed, --resume", runs.lost(alpha, copy.name))


def _names_the_folder_and_takes_one_that_all_share(
    runs: Runs, alpha: Path, beta: Path, settings: dict[str, Any]
) -> None:
    """On one host, which lacks the other's files; then with all of them in one folder."""
    work = runs.place / f"moved_{alpha.name}"
    shutil.copytree(alpha, work, symlinks=True)
    refused = runs.resume(work, ranks=1, **settings)
    if settings["zero_optimization"]["stage"] > 0:
        assert refused.codes == [2], refused.output
        assert "it is in this folder of beta" in refused.output
        assert "copy it into a folder that all share" in refused.output
    shutil.copytree(beta / "deepspeed", work / "deepspeed", dirs_exist_ok=True)
    taken = runs.resume(work, ranks=1, **settings)
    assert taken.good, taken.output


@EXTENDED
def test_three_hosts_end_as_one_host_does(place: Path, runs: Runs) -> None:
    settings = {"train_batch_size": 12}
    assert runs.go(runs.place / "whole_three", ranks=3, **settings).good
    work = runs.place / "three_hosts"
    with network(place / "three", ["alpha", "beta", "gamma"]) as hosts:
        with waiting(hosts, runs, work, **settings) as launch:
            hosts.hosts[2].ranks()[0].kill()
        assert launch.seconds < SOON, launch.output
        for name in ("alpha", "beta"):
            assert f"{name}: error: another host is lost (" in launch.output, launch.output
        train(hosts, runs, work, "--resume", **settings)
    survived("three hosts: one's ranks killed", "all ended; --resume", runs.lost(work, "whole_three"))
