"""The table of options: what is farther from the reference than it may be is told."""

from __future__ import annotations

import pytest

from benchmarks.exactness import agreeing
from tests.comparison import Worst
from tests.options import ALL_WAYS, Option, key_of, runs_of

ROW = Option("a row", (0, 3))


@pytest.mark.parametrize(("farthest", "told"), [(9e-6, "| 9e-06 | 0e+00 |  |"), (2e-5, "beyond what is allowed |")])
def test_what_is_beyond_its_bound_is_told(farthest: float, told: str) -> None:
    found = {key_of(*run): Worst() for run in runs_of([ROW], ALL_WAYS)}
    found[key_of(ROW, 3, ALL_WAYS[-1])] = Worst(scale_factors=farthest)
    assert list(agreeing([ROW], found))[-1].endswith(told)
