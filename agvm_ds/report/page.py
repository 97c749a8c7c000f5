"""One page of several runs: everything in one HTML file, and its pictures as PNGs beside it."""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from agvm_ds.report.advice import ALL, Advice, Interval, advise
from agvm_ds.report.pictures import pictures
from agvm_ds.report.runs import Run

PAGE = "index.html"


def write_page(runs: Sequence[Run], folder: Path, made: str) -> Path:
    """Write ``folder``/index.html and its PNGs, and return the page's path. made: what is said of when and by what."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = []
    for picture in pictures(runs):
        buffer = io.BytesIO()
        picture.figure.savefig(buffer, format="png")
        (folder / f"{picture.name}.png").write_bytes(buffer.getvalue())
        data = base64.b64encode(buffer.getvalue()).decode()
        shown.append({"title": picture.title, "caption": picture.caption, "data": data})
    environment = Environment(
        loader=PackageLoader("agvm_ds.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    text = environment.get_template("page.html").render(
        runs=runs,
        table=[run.words() for run in runs],
        pictures=shown,
        advice=[_advice(run) for run in runs],
        json=lambda value: json.dumps(value, indent=2),
        made=made,
    )
    draft = folder / f".{PAGE}"
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, folder / PAGE)
    return folder / PAGE


def _advice(run: Run) -> dict[str, Any]:
    """A run's advice in words, or why there is none."""
    if run.measures is None:
        return {"run": run.name, "reason": "nothing was measured"}
    try:
        found = advise(run.measures, run.batch)
    except ValueError as error:
        return {"run": run.name, "reason": str(error)}
    return {"run": run.name, "reason": "", **advice_words(found)}


def advice_words(found: Advice) -> dict[str, Any]:
    """``critical``: rows of (module, value, interval); ``speedups``: rows of (batch, times, interval, efficiency)."""
    return {
        "measures": found.measures,
        "batch": found.batch,
        "limits": found.limits,
        "all": ALL,
        "critical": [(name, images(one.value), between(one, images)) for name, one in found.critical.items()],
        "speedups": [
            (str(batch), f"{one.value:.2f}", between(one, "{:.2f}".format), f"{one.value * found.batch / batch:.0%}")
            for batch, one in found.speedups.items()
        ],
    }


def images(value: float) -> str:
    """A number of images."""
    return "∞" if math.isinf(value) else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def between(interval: Interval, form: Any) -> str:
    """Its ends, the smaller first."""
    low, high = sorted((interval.low, interval.high))
    return f"{form(low)} to {form(high)}"
