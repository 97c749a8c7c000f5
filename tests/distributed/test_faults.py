"""What a run survives: each fault is provoked in real processes, and what was lost is what the resumed run ends without.

``make test-faults`` prints the table: fault, what happened, what was lost.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agvm_ds.demo.data import ensure
from tests.faults.processes import config_lines
from tests.faults.runs import EPOCH, Runs, published
from tests.faults.table import survived
from tests.launch import launch_port, until
from tests.trainer import ROOT

EXIT_PREEMPTED = 143


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    place = tmp_path_factory.mktemp("faults")
    found = Runs(place, ensure(place / "digits", train=48, val=8))
    outcome = found.go(place / "whole")
    assert outcome.good, outcome.output
    return found


EXTENDED = pytest.mark.extended
"""Not in ``make test``: another of them shows the same."""


@pytest.mark.parametrize(
    ("where", "rank"),
    [
        pytest.param("forward", 1, marks=EXTENDED),
        ("backward", 1),
        pytest.param("measure", 1, marks=EXTENDED),
        ("saving", 1),
        ("committing", 0),
        ("publishing", 0),
        pytest.param("evaluating", 1, marks=EXTENDED),
    ],
)
def test_a_killed_rank_is_named_and_a_resume_loses_nothing(where: str, rank: int, runs: Runs) -> None:
    """Killed in update 8, two after the checkpoint of epoch 1; or while that of epoch 2 is written."""
    work = runs.place / f"killed_{where}"
    started = time.monotonic()
    outcome = runs.go(work, config_lines("Killed", rank=rank, update=EPOCH + 2, where=where))
    seconds = time.monotonic() - started
    assert (outcome.codes[rank], outcome.codes[1 - rank]) == (-signal.SIGKILL, 1), outcome.output
    assert outcome.output.count("error: ") == 1
    assert f"error: rank {rank} has died" in outcome.output
    epoch = 2 if where in ("publishing", "evaluating") else 1
    assert (work / "deepspeed" / "latest").read_text() == f"epoch_{epoch}"
    resumed = runs.resume(work)
    assert resumed.good, resumed.output
    assert f"at update {EPOCH * epoch}," in resumed.output
    assert not list((work / "deepspeed").glob(".*")), "drafts are gone"
    survived(
        f"SIGKILL of a rank, {where}",
        f"named, all ended in {seconds:.0f} s; --resume from epoch {epoch}",
        runs.lost(work),
    )


@pytest.mark.parametrize(
    "update",
    [pytest.param(EPOCH + 2, marks=EXTENDED), pytest.param(2 * EPOCH - 1)],
    ids=["mid-epoch", "last of an epoch"],
)
def test_sigterm_saves_the_update_in_hand(update: int, runs: Runs) -> None:
    work = runs.place / f"terminated_{update}"
    outcome = runs.go(work, config_lines("Terminated", rank=1, update=update))
    assert outcome.codes == [EXIT_PREEMPTED] * 2, outcome.output
    assert f"stopped by SIGTERM after update {update}" in outcome.output
    assert (work / "deepspeed" / "latest").read_text() == f"update_{update + 1}"
    resumed = runs.resume(work)
    assert resumed.good, resumed.output
    assert f"at update {update + 1}," in resumed.output
    assert not (work / "deepspeed" / f"update_{update + 1}").exists(), "it goes when an epoch's is there"
    survived(f"SIGTERM in update {update}", f"update finished, saved, exit {EXIT_PREEMPTED}; --resume", runs.lost(work))


@EXTENDED
def test_sigterm_while_evaluating(runs: Runs) -> None:
    """The evaluation is broken off, and comes first when the run is resumed."""
    work = runs.place / "terminated_evaluating"
    outcome = runs.go(work, config_lines("Terminated", rank=0, update=2 * EPOCH - 1, evaluating=True))
    assert outcome.codes == [EXIT_PREEMPTED] * 2, outcome.output
    resumed = runs.resume(work)
    assert resumed.good, resumed.output
    survived("SIGTERM while evaluating", "saved; --resume evaluates first", runs.lost(work))


@contextmanager
def waiting(runs: Runs, work: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A launch by DeepSpeed's launcher, which waits in update 8 until the end of the context; then it has ended."""
    waits, goes_on = work.with_suffix(".waits"), work.with_suffix(".until")
    fault = config_lines("Waiting", update=EPOCH + 2, waits=str(waits), until=str(goes_on))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with launch_port() as port, work.with_suffix(".txt").open("w") as log:
        words = ["deepspeed", "--num_gpus", "2", "--master_port", str(port), str(ROOT / "launch/train.py")]
        command = [*words, *runs.words(work, fault)]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        until(waits.exists, 90)
        yield process
        goes_on.touch()
        process.wait(timeout=120)
        until(lambda: not _in_group(process.pid), 90)  # DeepSpeed's launcher outlives its command


def test_sigterm_to_the_launcher(runs: Runs) -> None:
    """DeepSpeed's launcher passes it to one rank after the other, data workers included, and waits 30 seconds for each."""
    work = runs.place / "launcher"
    with waiting(runs, work) as process:
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(1)
    output, code = work.with_suffix(".txt").read_text(), process.returncode
    assert code != 0
    assert f"stopped by SIGTERM after update {EPOCH + 2}" in output, output
    assert "Traceback" not in output
    resumed = runs.resume(work)
    assert resumed.good, resumed.output
    survived("SIGTERM to the launch", f"update finished, saved, launcher's exit {code}; --resume", runs.lost(work))


def _in_group(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def two_epochs(runs: Runs) -> Path:
    """A run that was stopped after its second epoch."""
    work = runs.place / "two_epochs"
    outcome = runs.go(work, config_lines("Killed", rank=1, update=2 * EPOCH + 1, where="forward"))
    assert (work / "deepspeed" / "latest").read_text() == "epoch_2", outcome.output
    return work


def flip(file: Path) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)


DAMAGE = {
    "cut short": (lambda file: os.truncate(file, file.stat().st_size // 2), "cut short"),
    "missing": (Path.unlink, "missing"),
    "one bit flipped": (flip, "not the bytes that were written"),
}
SHARD = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.mark.parametrize(
    "kind",
    [pytest.param("cut short", marks=EXTENDED), pytest.param("missing", marks=EXTENDED), "one bit flipped"],
)
def test_a_damaged_checkpoint_is_named_and_an_older_one_taken_only_when_allowed(
    kind: str, runs: Runs, two_epochs: Path
) -> None:
    work = runs.place / f"damaged_{kind.replace(' ', '_')}"
    shutil.copytree(two_epochs, work, symlinks=True)
    damage, words = DAMAGE[kind]
    damage(work / "deepspeed" / "epoch_2" / SHARD)
    refused = runs.resume(work)
    assert refused.codes == [2, 2]
    assert refused.output.count("error: ") == 1
    assert f"epoch_2/{SHARD}" in refused.output
    assert words in refused.output
    assert "epoch_1 (update 6) is whole" in refused.output
    allowed = runs.resume(work, "--allow-older")
    assert allowed.good, allowed.output
    assert f"at update {EPOCH}," in allowed.output
    survived(f"checkpoint file {kind}", "named; --allow-older continues from the one before", runs.lost(work))


def test_a_full_disk_leaves_the_checkpoint_before(runs: Runs) -> None:
    work = runs.place / "full"
    states = work / "deepspeed"
    states.mkdir(parents=True)
    size = sum(file.stat().st_size for file in (runs.place / "whole/deepspeed/epoch_3").iterdir())
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", str(states)], check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small file system")
    try:
        outcome = runs.go(work)
        assert outcome.codes.count(0) == 0
        assert outcome.output.count("error: ") == 1, outcome.output
        assert "checkpoint epoch_2 cannot be written" in outcome.output
        assert "epoch_1, is as it was" in outcome.output
        assert (states / "latest").read_text() == "epoch_1"
        kept = work.parent / "kept"
        shutil.copytree(states, kept)
    finally:
        subprocess.run(["umount", str(states)], check=True)
    shutil.rmtree(states)
    kept.rename(states)
    resumed = runs.resume(work)
    assert resumed.good, resumed.output
    survived("disk full while saving", "told; the checkpoint before is whole; --resume", runs.lost(work))


@EXTENDED
def test_sigterm_in_the_evaluation_of_a_resumed_run_that_had_ended(runs: Runs) -> None:
    """It has nothing left to train; resumed once more it must not begin again."""
    work = runs.place / "ended"
    shutil.copytree(runs.place / "whole", work, symlinks=True)
    stopped = runs.go(work, config_lines("Terminated", rank=0, update=None, evaluating=True), "--resume")
    assert stopped.codes == [EXIT_PREEMPTED] * 2, stopped.output
    resumed = runs.resume(work)
    assert resumed.good, resumed.output
    assert "Epoch [" not in resumed.output, "nothing is trained"
    survived("SIGTERM while a finished run evaluates", "saved; --resume evaluates", runs.lost(work))


def test_the_seed_of_a_run_is_taken_up_by_a_resume_without_one(runs: Runs) -> None:
    work = runs.place / "seed"
    outcome = runs.go(work, config_lines("Terminated", rank=1, update=EPOCH + 2))
    assert outcome.codes == [EXIT_PREEMPTED] * 2
    resumed = runs.resume(work, seed=None)
    assert resumed.good, resumed.output
    survived("--resume without --seed", "the run's own is taken", runs.lost(work))


def test_keep_bounds_the_disk(runs: Runs) -> None:
    work = runs.place / "keep"
    outcome = runs.go(work, "", "--keep", "1")
    assert outcome.good, outcome.output
    assert sorted(path.name for path in (work / "deepspeed").iterdir() if path.is_dir()) == ["epoch_3"]
    assert published(work) == ["epoch_3.pth"]


def test_a_second_launch_in_the_same_work_dir_is_refused(runs: Runs) -> None:
    work = runs.place / "twice"
    with waiting(runs, work) as process:
        second = runs.resume(work)
    assert process.returncode == 0, work.with_suffix(".txt").read_text()
    assert second.codes == [2, 2]
    assert second.output.count("error: ") == 1
    assert "another launch is at work there (rank 0 is process" in second.output
    survived("a second launch in a work dir", "refused; the first went on", runs.lost(work))


@EXTENDED
def test_a_slow_rank_is_not_a_fault(runs: Runs) -> None:
    work = runs.place / "slow"
    outcome = runs.go(work, config_lines("Slow", rank=1, update=EPOCH + 2, seconds=15))
    assert outcome.good, outcome.output
    survived("a rank 15 s late", "the others waited", runs.lost(work))


@EXTENDED
def test_a_new_run_sets_the_earlier_ones_checkpoints_aside(runs: Runs, two_epochs: Path) -> None:
    work = runs.place / "anew"
    shutil.copytree(two_epochs, work, symlinks=True)
    told = {name: (work / name).read_bytes() for name in ("agvm.jsonl", "run.json", "config.py", "deepspeed.json")}
    outcome = runs.go(work)
    assert outcome.good, outcome.output
    assert "checkpoints of an earlier run in this work dir are now in" in outcome.output
    (aside,) = work.glob("deepspeed_*")
    assert (aside / "latest").read_text() == "epoch_2"
    assert all((aside / name).read_bytes() == content for name, content in told.items())
    logs = json.loads((work / "run.json").read_text())["logs"]
    assert len(logs) == 1 and logs != json.loads(told["run.json"])["logs"]
    survived("a new run in a used work dir", "the earlier checkpoints are set aside", runs.lost(work))
    shutil.rmtree(work / "deepspeed")
    aside.rename(work / "deepspeed")
    (work / "agvm.jsonl").write_text("")  # of the new run, which is given up
    outcome = runs.resume(work)
    assert outcome.good, outcome.output
    survived("the earlier run, named deepspeed again", "--resume continues it", runs.lost(work))
