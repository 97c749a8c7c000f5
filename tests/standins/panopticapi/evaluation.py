"""Panoptic quality (arXiv 1801.00868, section 4): PQ = SQ RQ, the mean over the categories that occur.

SQ is the mean IoU of matched segments, RQ = TP / (TP + FP / 2 + FN / 2).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

VOID = 0
OFFSET = 256**3


@dataclass
class PQStatCat:
    """The counts of one category."""

    iou: float = 0.0
    tp: int = 0
    fp: int = 0
    fn: int = 0

    def __iadd__(self, other: PQStatCat) -> PQStatCat:
        for name in ("iou", "tp", "fp", "fn"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def figures(self) -> dict[str, float]:
        sq = self.iou / self.tp if self.tp else 0.0
        rq = self.tp / (self.tp + (self.fp + self.fn) / 2) if self.occurs else 0.0
        return {"pq": sq * rq, "sq": sq, "rq": rq}

    @property
    def occurs(self) -> bool:
        return self.tp + self.fp + self.fn > 0


class PQStat:
    """The counts of all categories, by id."""

    def __init__(self) -> None:
        self.pq_per_cat: defaultdict[int, PQStatCat] = defaultdict(PQStatCat)

    def __getitem__(self, category: int) -> PQStatCat:
        return self.pq_per_cat[category]

    def __iadd__(self, other: PQStat) -> PQStat:
        for category, counts in other.pq_per_cat.items():
            self[category].__iadd__(counts)
        return self

    def pq_average(self, categories: dict[int, Any], isthing: bool | None) -> tuple[dict[str, Any], dict[int, Any]]:
        """(means over the categories that occur, each category's own); isthing: of things, of stuff, or of all."""
        wanted = [key for key, kind in categories.items() if isthing is None or bool(kind["isthing"]) == isthing]
        each = {key: self[key].figures() for key in wanted}
        found = [each[key] for key in wanted if self[key].occurs]
        means = {name: sum(one[name] for one in found) / max(len(found), 1) for name in ("pq", "sq", "rq")}
        return {**means, "n": len(found)}, each
