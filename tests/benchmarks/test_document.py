"""docs/performance.md: every benchmark has its place in it."""

from __future__ import annotations

import pytest

from benchmarks.__main__ import DOCUMENT, PARTS, with_table


@pytest.mark.parametrize("name", PARTS)
def test_a_table_goes_between_its_marks_and_nowhere_else(name: str) -> None:
    before = DOCUMENT.read_text()
    after = with_table(before, name, "| a table |")
    assert "| a table |" in after
    begin, end = f"<!-- made by python -m benchmarks {name} --write -->\n", f"<!-- end of {name} -->\n"
    assert after.partition(begin)[0] == before.partition(begin)[0]
    assert after.partition(end)[2] == before.partition(end)[2]
    assert with_table(after, name, "| a table |") == after


def test_a_benchmark_without_a_place_is_an_error() -> None:
    with pytest.raises(LookupError, match="no place for updates"):
        with_table("text", "updates", "| a table |")
