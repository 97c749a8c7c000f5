"""agvm.jsonl after a run that was killed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from agvm_ds.monitor import JsonLines


def test_a_resumed_run_drops_what_goes_too_far_and_what_is_no_measure(tmp_path: Path) -> None:
    """A line cut off by a full disk may still end in "}"."""
    path = tmp_path / "agvm.jsonl"
    kept = [json.dumps({"update": update, "modules": {}}) for update in (0, 2)]
    odd = [
        '{"update": 4, "modules": {"backbone": {}',
        '{"modules": {}}',
        "[]",
        "null",
        '{"update": "two"}',
        "",
        '{"update": 1',
    ]
    path.write_text("\n".join([kept[0], *odd, kept[1], json.dumps({"update": 4, "modules": {}})]) + "\n")
    controller: Any = SimpleNamespace(steps=4)
    JsonLines(path, controller)
    assert path.read_text().splitlines() == kept
