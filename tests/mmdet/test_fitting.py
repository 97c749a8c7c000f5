"""The search for the largest micro-batch, on launches that are played by a small program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.data import check_size
from agvm_ds.mmdet.fitting import find, largest, trial_json
from agvm_ds.mmdet.plan import Batch
from tests.launch import until

PLAYED = """
import json, sys
file = sys.argv[sys.argv.index("--deepspeed_config") + 1]
micro = json.load(open(file))["train_micro_batch_size_per_gpu"]
assert "--dry-run" in sys.argv
if micro > {most}:
    print({message!r})
    sys.exit(1)
print("│ peak memory, this rank │ " + str(micro) + ".00 GiB │")
print("dry run: no work dir was made or changed; the same command without --dry-run trains")
"""


@pytest.mark.parametrize("true", [0, 1, 2, 3, 5, 8, 11, 31, 32, 33, 100])
@pytest.mark.parametrize("most", [1, 7, 32, 100])
def test_the_largest_is_found_in_few_trials(true: int, most: int) -> None:
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= true

    assert largest(fits, most) == min(true, most)
    assert len(asked) == len(set(asked)) <= 14 and max(asked) <= most


def played(place: Path, most: int, message: str) -> tuple[list[str], str]:
    """(a launcher whose launches fit up to so many images, a DeepSpeed JSON)."""
    program, settings = place / "played.py", place / "ds.json"
    program.write_text(PLAYED.format(most=most, message=message))
    settings.write_text(json.dumps({"train_batch_size": 512, "agvm": {"start_step": 500}}))
    return [sys.executable, str(program)], str(settings)


@pytest.mark.parametrize(
    "message",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory",
        "Process 12 exits with return code = -9",
        "RuntimeError: CUDA error: out of memory",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 2.00 GiB for an array",
    ],
)
def test_memory_that_runs_out_ends_the_search(message: str, tmp_path: Path) -> None:
    told: list[str] = []
    launcher, settings = played(tmp_path, 6, message)
    assert find(launcher, ["config.py"], settings, 64, told.append) == 6
    assert told[0] == "1 images a micro-batch: fits, peak memory, this rank : 1.00 GiB"
    assert "8 images a micro-batch: out of memory" in told


def test_a_launch_that_ends_early_does_not_fit(tmp_path: Path) -> None:
    """DeepSpeed's launcher ends with 0 when a signal ends what it started."""
    program = tmp_path / "ended.py"
    program.write_text("")
    _, settings = played(tmp_path, 1, "")
    with pytest.raises(ConfigError, match="trial with 1 images .* failed"):
        find([sys.executable, str(program)], ["config.py"], settings, 64, lambda text: None)


def test_a_small_training_set_ends_the_search(tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(ConfigError) as caught:
        check_size(10, Batch(16, 8, 2, 1))
    launcher, settings = played(tmp_path, 5, str(caught.value))
    assert find(launcher, ["config.py"], settings, 64, told.append) == 5
    assert "8 images a micro-batch: more than the training set has" in told


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("importing\nerror: no config\nin a.py\n[2026-01-01 00:00:00] [launch.py] Killing", "no config\nin a.py"),
        ("error: no config", "no config"),
        ("importing\nTraceback\nKeyError: 'error: 1'", "importing\nTraceback\nKeyError: 'error: 1'"),
    ],
)
def test_another_failure_is_told_in_its_own_words(said: str, told: str, tmp_path: Path) -> None:
    launcher, settings = played(tmp_path, 2, said)
    with pytest.raises(ConfigError) as caught:
        find(launcher, ["config.py"], settings, 64, lambda text: None)
    assert str(caught.value) == f"the trial with 4 images a micro-batch failed, and not for memory:\n{told}"


def test_an_interrupted_search_says_nothing_more(tmp_path: Path) -> None:
    _, settings = played(tmp_path, 1, "")
    (tmp_path / "deepspeed").write_text(
        f"#!{sys.executable}\nprint('begun', flush=True)\nimport time; time.sleep(600)\n"
    )
    (tmp_path / "deepspeed").chmod(0o755)
    search = subprocess.Popen(
        [sys.executable, "launch/find_micro_batch.py", "config.py", "--deepspeed_config", settings],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background has it ignored
    )
    until(lambda: bool(psutil.Process(search.pid).children()), 120)
    os.killpg(search.pid, signal.SIGINT)
    _, said = search.communicate(timeout=60)
    assert search.returncode == 130 and "Traceback" not in said


def test_a_trial_measures_if_the_run_would() -> None:
    run: dict[str, Any] = {"train_batch_size": 512, "zero_optimization": {"stage": 2}}
    trial = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    assert trial_json(run, 4) == trial
    block = {"start_step": 560, "interval": 10, "anchor": "neck", "stop_step": 600}
    acts = {"start_step": 0, "interval": 1, "anchor": "neck", "stop_step": None}
    assert trial_json({**run, "agvm": block}, 4) == {**trial, "agvm": acts}
    half = {"enabled": True, "initial_scale_power": 16}
    assert trial_json({**run, "fp16": half}, 4) == {**trial, "fp16": {**half, "loss_scale": 1.0}}, "no skipped step"
