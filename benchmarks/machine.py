"""Where figures come from: the machine in words, the versions, the date; and one file for all of a benchmark's rows."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "deepspeed", "mmdet", "mmcv-full")


def describe() -> dict[str, str]:
    """The machine in words, nothing that names it: processor, cores, memory, accelerator, versions; the date (UTC)."""
    memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{os.cpu_count()} cores of {_processor()}, {memory} GiB, {_accelerator()}",
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)]
        ),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _accelerator() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def save(folder: Path | None, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``<name>.json``: the machine and the rows. None: nowhere."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps({**describe(), "rows": list(rows)}, indent=1) + "\n")


def with_table(document: str, name: str, table: str) -> str:
    """The document with a table, and what it was measured on, between its two marks. Raises LookupError without them."""
    about = describe()
    said = f"{about['date']}, {about['machine']}; {about['versions']}."
    return between_marks(document, name, f"{said}\n\n{table}")


def between_marks(document: str, name: str, text: str) -> str:
    """The document with this text between its two marks. Raises LookupError without them."""
    head, begin, rest = document.partition(f"<!-- begin of {name} -->\n")
    _, end, tail = rest.partition(f"<!-- end of {name} -->\n")
    if not (begin and end):
        raise LookupError(f"the document has no place for {name}")
    return f"{head}{begin}\n{text.strip()}\n\n{end}{tail}"
