"""What was found in one annotation file and the images that it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LISTED = 10
"""Places that are told of each kind of finding."""


@dataclass
class Report:
    """What was found in a file: places by kind of finding, and counts."""

    file: str
    refused: dict[str, list[str]] = field(default_factory=dict)
    noted: dict[str, list[str]] = field(default_factory=dict)
    images: list[Mapping[str, Any]] = field(default_factory=list)
    annotations: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    """Class -> the label that mmdet gives it."""
    seen: int = 0
    """Classes with an annotation."""

    def refuse(self, what: str, where: str = "") -> None:
        """Count one finding that a run cannot start with."""
        self.refused.setdefault(what, []).append(where)

    def note(self, what: str, where: str = "") -> None:
        """Count one finding that mmdet handles by itself."""
        self.noted.setdefault(what, []).append(where)

    def lines(self, noted: bool = False) -> list[str]:
        """One line a kind of what is refused, or noted: what, the first places, how many in all."""
        return [f"{self.file}: {_told(*item)}" for item in (self.noted if noted else self.refused).items()]


def _told(what: str, places: list[str]) -> str:
    named = [place for place in places[:LISTED] if place]
    more = f" and {len(places) - len(named)} more ({len(places)} in all)" if len(places) > len(named) > 0 else ""
    return f"{what}: {', '.join(named)}{more}" if named else what
