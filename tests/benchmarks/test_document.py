"""Every table that a benchmark writes has its place in the docs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import __main__ as cost
from benchmarks import exactness, zoo
from benchmarks.machine import with_table


@pytest.mark.parametrize(
    ("document", "name"),
    [
        *((cost.DOCUMENT, cost.place(part, False)) for part in cost.ON_CPU),
        *((cost.DOCUMENT, cost.place(part, True)) for part in cost.ON_A_GPU),
        (exactness.DOCUMENT, exactness.PLACE_ON_A_GPU),
        (zoo.DOCUMENT, "modules"),
        (zoo.DOCUMENT, "training"),
        (zoo.DOCUMENT, "bf16"),
    ],
)
def test_a_table_goes_between_its_marks_and_nowhere_else(document: Path, name: str) -> None:
    before = document.read_text()
    after = with_table(before, name, "| a table |")
    assert "| a table |" in after
    begin, end = f"<!-- begin of {name} -->\n", f"<!-- end of {name} -->\n"
    assert after.partition(begin)[0] == before.partition(begin)[0]
    assert after.partition(end)[2] == before.partition(end)[2]
    assert with_table(after, name, "| a table |") == after


def test_a_benchmark_without_a_place_is_an_error() -> None:
    with pytest.raises(LookupError, match="no place for updates"):
        with_table("text", "updates", "| a table |")
