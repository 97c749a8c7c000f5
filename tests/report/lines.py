"""Lines of agvm.jsonl, and whole work dirs, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODULES = ("neck", "backbone", "roi_head.bbox_head")


def line(update: int, **changed: dict[str, Any]) -> str:
    """A measure in which module i has variance 0.1 (i + 1), and what ``changed`` says."""
    modules = {
        name: {"variance": 0.1 * (i + 1), "ratio": 1.0, "scale_factor": 1 + update / 100 * i, "noise_scale": 10.0 * i}
        | {"lr": 0.004, "effective_lr": 0.004 * (1 + update / 100 * i), "noise": 10.0 * i, "signal": 1.0}
        | changed.get(name, {})
        for i, name in enumerate(MODULES)
    }
    return json.dumps({"update": update, "samples": 16 * update, "anchor": "backbone", "modules": modules})


def written(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "agvm.jsonl"
    path.write_text("".join(f"{text}\n" for text in lines))
    return path
