"""launch/train.py and launch/test.py over several ranks, without the launcher: forked, so that a run costs seconds.

What a user's terminal would show is returned; a mistake must end every rank by itself, for nobody kills the others.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.launch import CONTEXT, launch_port, set_rank

ROOT = Path(__file__).parents[1]
DEMO_CONFIG = ROOT / "agvm_ds/demo/faster_rcnn_digits.py"


@dataclass(frozen=True)
class Outcome:
    """How a launch ended."""

    codes: list[int]
    output: str

    @property
    def good(self) -> bool:
        return set(self.codes) == {0}


def launch(
    script: str, arguments: Sequence[str], place: Path, ranks: int = 2, timeout: float = 120, folder: str = "launch"
) -> Outcome:
    """Run ``<folder>/<script>`` in ``ranks`` processes, as DeepSpeed's launcher would start them."""
    place.mkdir(parents=True, exist_ok=True)
    output = place / f"output_{len(list(place.glob('output_*')))}.txt"
    output.touch()
    with launch_port() as port:
        processes = [
            CONTEXT.Process(
                target=_rank, args=(ROOT / folder / script, list(arguments), rank, ranks, port, str(output))
            )
            for rank in range(ranks)
        ]
        hung = _hung(processes, timeout)
    text = output.read_text()
    assert not hung, f"ranks {hung} did not end in {timeout} s:\n{text}"
    return Outcome([process.exitcode or 0 for process in processes], text)


def _hung(processes: list[Any], timeout: float) -> list[int]:
    """Start the ranks; those that did not end in time, which are killed."""
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(end - time.monotonic(), 0.1))
    hung = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    for process in processes:
        process.kill()
        process.join()
    return hung


def _rank(script: Path, arguments: list[str], rank: int, ranks: int, port: int, output: str) -> None:
    set_rank(rank, ranks, ranks)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CROSS_RANK": "0", "CROSS_SIZE": "1"}
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [str(script), f"--local_rank={os.environ['LOCAL_RANK']}", *arguments]
    runpy.run_path(str(script), run_name="__main__")


def data_options(digits: Path) -> dict[str, Any]:
    """--cfg-options for a data set that ``agvm_ds.demo.data`` made."""
    options: dict[str, Any] = {}
    for split, folder in (("train", "train"), ("val", "val"), ("test", "val")):
        options[f"data.{split}.ann_file"] = digits / f"annotations/{folder}.json"
        options[f"data.{split}.img_prefix"] = digits / folder
    return options


def cfg_options(options: dict[str, Any]) -> list[str]:
    """As words of a command line."""
    return ["--cfg-options", *(f"{key}={value}" for key, value in options.items())] if options else []


def write_config(place: Path, change: str = "") -> Path:
    """The demo's config under another name (the demo itself would look for its own data), with lines of Python after it."""
    place.mkdir(parents=True, exist_ok=True)
    path = place / "digits_config.py"
    path.write_text(f"{DEMO_CONFIG.read_text()}\n{change}\n")
    return path


def write_json(place: Path, settings: dict[str, Any]) -> Path:
    """A DeepSpeed JSON."""
    place.mkdir(parents=True, exist_ok=True)
    path = place / "ds.json"
    path.write_text(json.dumps(settings))
    return path


def logged(work_dir: Path, mode: str = "val") -> list[dict[str, Any]]:
    """The lines of the newest ``.log.json`` of a mode."""
    newest = max(work_dir.glob("*.log.json"))
    lines = [json.loads(line) for line in newest.read_text().splitlines()]
    return [line for line in lines if line.get("mode") == mode]
