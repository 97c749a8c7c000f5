"""The table of faults that ``make test-faults`` prints: what happened, and what was lost."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

ROWS: list[tuple[str, str, str]] = []
NOTHING = "nothing"


def survived(fault: str, happened: str, lost: str) -> None:
    """A row of the table; lost: as measured, "nothing" or what; a loss fails the test."""
    ROWS.append((fault, happened, lost))
    assert lost == NOTHING


def show() -> None:
    """Print the rows so far, if there are any."""
    if not ROWS:
        return
    table = Table("fault", "what happened", "what was lost")
    for row in ROWS:
        table.add_row(*row)
    Console(width=140).print(table)
