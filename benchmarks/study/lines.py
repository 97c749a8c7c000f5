"""docs/study/runs.jsonl: a line a run, as committed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "docs/study"
FILE = FOLDER / "runs.jsonl"


def read(file: Path = FILE) -> list[dict[str, Any]]:
    """All lines; of a run that failed before it was done, each."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def append(line: Mapping[str, Any], file: Path = FILE) -> None:
    """One more line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write(json.dumps(line, separators=(",", ":")) + "\n")
