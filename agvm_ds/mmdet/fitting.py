"""The largest micro-batch that fits in memory: dry runs of launch/train.py, each a launch of its own, with other sizes.

A process that has run out of memory is no ground to try another size on, and a rank that has leaves the others in a
collective: so a launch a size, which DeepSpeed's launcher ends as a whole.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agvm_ds.config import ConfigError
from agvm_ds.deepspeed_json import BATCH_KEYS, load_config
from agvm_ds.mmdet.rehearsal import REHEARSED

TRAIN = Path(__file__).parents[2] / "launch/train.py"
OUT_OF_MEMORY = (
    "out of memory",
    "alloc_failed",
    "allocate memory",
    "memoryerror",
    "bad_alloc",
    "exits with return code = -9",
)
"""In small letters what torch, CUDA, NumPy and DeepSpeed's launcher say of memory that ran out; -9 is a host's way."""
TOO_FEW = "fewer than one global batch"
"""What launch/train.py says of a training set that a trial's batch is larger than."""
ACCUMULATION = 2
"""Micro-batches in an update that is tried: gradients that are kept, and AGVM's least n on one rank, are in it."""


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` that fits, by doubling and then halving the gap; 0 when 1 does not.

    ``fits`` must be true up to some number and false beyond.
    """
    good, size = 0, 1
    while size <= most and fits(size):
        good, size = size, size * 2
    bad = min(size, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def trial_json(settings: Mapping[str, Any], micro: int) -> dict[str, Any]:
    """The JSON of a trial: an update of two micro-batches of that size on each rank, measured if AGVM is on."""
    kept = {key: value for key, value in settings.items() if key not in BATCH_KEYS}
    trial = {**kept, "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": ACCUMULATION}
    if isinstance(block := settings.get("agvm"), Mapping):
        trial["agvm"] = {**block, "start_step": 0, "interval": 1, "stop_step": None}
    if isinstance(fp16 := settings.get("fp16"), Mapping):  # an overflow would skip the step, and what it takes
        trial["fp16"] = {**fp16, "loss_scale": 1.0}
    return trial


def find(
    launcher: Sequence[str], arguments: Sequence[str], deepspeed_config: str, most: int, tell: Callable[[str], Any]
) -> int:
    """The largest micro-batch of a launch; launcher: DeepSpeed's and its options, arguments: train.py's, without the JSON.

    Raises ConfigError with what a trial said that failed for another reason than memory.
    """
    settings = load_config(deepspeed_config)

    def fits(micro: int) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "deepspeed.json"
            file.write_text(json.dumps(trial_json(settings, micro)))
            words = [*launcher, str(TRAIN), *arguments, "--deepspeed_config", str(file), "--dry-run"]
            done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        said = done.stdout.lower()
        if done.returncode == 0 and REHEARSED in said:  # DeepSpeed's launcher, killed, ends with 0
            tell(f"{micro} images a micro-batch: fits{peak_of(done.stdout)}")
            return True
        if any(words in said for words in OUT_OF_MEMORY):
            tell(f"{micro} images a micro-batch: out of memory")
            return False
        if TOO_FEW in said and micro > 1:
            tell(f"{micro} images a micro-batch: more than the training set has")
            return False
        raise ConfigError(
            f"the trial with {micro} images a micro-batch failed, and not for memory:\n{reason_of(done.stdout)}"
        )

    return largest(fits, most)


def reason_of(output: str) -> str:
    """The message with which launch/train.py refused, up to the launcher's next line; else the end of what was said."""
    _, refused, rest = f"\n{output}".partition("\nerror: ")
    return rest.partition("\n[")[0].strip() if refused else output[-3000:].strip()


def peak_of(output: str) -> str:
    """What a dry run on a GPU says of its memory."""
    line = next((line for line in output.splitlines() if "peak memory" in line), "")
    return f", {' '.join(line.strip('│ ').split()).replace('│', ':')}" if line else ""
