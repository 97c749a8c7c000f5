"""examples/: each as a user starts it, on two ranks."""

from __future__ import annotations

import re
from pathlib import Path

from agvm_ds.config import AGVMConfig
from agvm_ds.variance import factor_bounds
from tests.trainer import ROOT, launch

LINE = re.compile(r"update (\d+): loss ([\d.]+), scale factors: (.+)")


def test_every_example_is_tried_here() -> None:
    assert [path.name for path in (ROOT / "examples").glob("*.py")] == ["without_mmdet.py"]


def test_without_mmdet_it_learns_and_its_heads_are_modulated(tmp_path: Path) -> None:
    outcome = launch("without_mmdet.py", [], tmp_path, folder="examples")
    assert outcome.good, outcome.output
    shown = LINE.findall(outcome.output)
    assert [int(update) for update, *_ in shown] == list(range(10, 101, 10)), outcome.output
    losses = [float(loss) for _, loss, _ in shown]
    assert losses[-1] < 0.7 * losses[0]
    low, high = factor_bounds(AGVMConfig().ratio_bounds)
    factors = {name: float(mu) for name, mu in (pair.split() for pair in shown[-1][2].split(", "))}
    assert factors.pop("encoder") == 1.0
    assert set(factors) == {"decoder", "classifier"}
    assert all(low <= mu <= high for mu in factors.values()), factors
    assert max(abs(mu - 1) for mu in factors.values()) > 0.1, factors
