"""Which runs are still to do, by what is done: the order of docs/study.md, and its choices of learning rates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from benchmarks.study.protocol import (
    ABLATION,
    ALONE,
    BASE_BATCH,
    BATCHES,
    BATCHES_ALONE,
    CENTRAL_BATCH,
    CHOOSING_SEED,
    FEWER_SEEDS,
    FIRST_RATES,
    METHODS,
    METHODS_AT,
    METHODS_AT_EQUAL_UPDATES,
    METHODS_HALFWAY,
    MODULATED,
    MOST_RATES,
    OTHER_NORM,
    POWER,
    SEEDS,
    Run,
    scaled,
)

Line = Mapping[str, Any]
"""What runs.jsonl has of a run."""
DIVERGED, FAILED, DONE = "diverged", "failed", "done"


@dataclass(frozen=True)
class Cell:
    """A method of a base at a batch: its rate is chosen with one seed, others are reported."""

    base: str
    method: str
    batch: int


def cells() -> Iterator[Cell]:
    """Those that are reported, in their order."""
    yield from (Cell(base, one, batch) for batch, some in METHODS_AT.items() for base in MODULATED for one in some)
    yield from (Cell(base, "plain", batch) for base in ALONE for batch in BATCHES_ALONE)


class Study:
    """What the lines say: ``known`` are those of runs that ended, a diverged one with an mAP of 0."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.known = {line["key"]: line for line in lines if line["status"] != FAILED}
        self._choosing: dict[Cell, list[Run]] = {}

    def chosen(self, cell: Cell) -> Run | None:
        """The cell's best run with the choosing seed; None while one of them is still to do, or not known."""
        runs = self.choosing(cell)
        if not runs or any(run.key not in self.known for run in runs):
            return None
        return max(runs, key=self._score)

    def chosen_line(self, cell: Cell) -> Line | None:
        """The line of that run."""
        chosen = self.chosen(cell)
        return self.known[chosen.key] if chosen else None

    def chosen_lines(self, cell: Cell) -> list[Line]:
        """The same, as a list of one or none."""
        line = self.chosen_line(cell)
        return [line] if line else []

    def equal_lines(self, cell: Cell) -> list[Line]:
        """The known lines of the cell's runs at equal updates."""
        return [self.known[run.key] for run in self.at_equal_updates(cell) if run.key in self.known]

    def first_runs(self, cell: Cell) -> list[Line]:
        """The lines of all the cell's runs with the choosing seed."""
        wanted = ("epochs", cell.base, cell.method, cell.batch, CHOOSING_SEED)
        names = ("series", "base", "method", "batch", "seed")
        return [line for line in self.known.values() if tuple(line["run"][name] for name in names) == wanted]

    def _score(self, run: Run) -> float:
        return float(self.known[run.key]["choose"])

    def choosing(self, cell: Cell) -> list[Run]:
        """The cell's runs with the choosing seed, one a rate; none while it is not known which."""
        if cell not in self._choosing:
            self._choosing[cell] = self._runs_to_choose_from(cell)
        return self._choosing[cell]

    def _runs_to_choose_from(self, cell: Cell) -> list[Run]:
        begin = self._begin(cell)
        if begin is None:
            return []
        first = Run("epochs", cell.base, cell.method, cell.batch, begin, CHOOSING_SEED)
        if cell.method == "split":
            return [first]
        if cell.method == "fixed":
            source = self.chosen_line(Cell(cell.base, "pairwise", cell.batch))
            if source is None:
                return []
            first = first.with_(multipliers=source["mean_scale_factors"])
        return self._search(first)

    def _begin(self, cell: Cell) -> float | None:
        """Where the search for a cell's rate begins, or split's rate, which is pairwise's; None while that is not known."""
        if cell == (base := Cell(cell.base, "plain", BASE_BATCH)):
            return FIRST_RATES[cell.base]
        if cell.method == "plain":
            best = self.chosen(base)
            return scaled(cell.base, best.rate, cell.batch) if best else None
        source = self.chosen(Cell(cell.base, "pairwise" if cell.method == "split" else "plain", cell.batch))
        return source.rate if source else None

    def _search(self, first: Run) -> list[Run]:
        """The first run's rate and half of it, then on by factors of two while the best is at an edge."""
        found = [first.rate / 2, first.rate]
        while len(found) < MOST_RATES:
            runs = [first.with_(rate=rate) for rate in found]
            if any(run.key not in self.known for run in runs):
                break
            best = max(runs, key=self._score).rate
            if found[0] < best < found[-1]:
                break
            found = [found[0] / 2, *found] if best == found[0] else [*found, found[-1] * 2]
        return [first.with_(rate=rate) for rate in found]

    def reported(self, cell: Cell) -> list[Run]:
        """The cell's runs with the other seeds; none while its rate is not chosen."""
        chosen = self.chosen(cell)
        return _all(chosen) if chosen else []

    def at_equal_updates(self, cell: Cell) -> list[Run]:
        """The cell's runs with the updates, and the rate, of CENTRAL_BATCH; at that batch they are the first series'."""
        chosen = self.chosen(replace(cell, batch=CENTRAL_BATCH))
        if chosen is None:
            return []
        series = chosen.series if cell.batch == CENTRAL_BATCH else "updates"
        return _few(chosen.with_(series=series, batch=cell.batch))

    def halfway(self, cell: Cell) -> list[Run]:
        """The cell's runs at its halfway rate, then at those of the base's other METHODS_HALFWAY: each is seen at all."""
        chosen = self.chosen(cell)
        if chosen is None:
            return []
        others = (replace(cell, method=method) for method in METHODS_HALFWAY)
        rates = dict.fromkeys(rate for one in (cell, *others) if (rate := self._halfway_rate(one)))
        return [run for rate in rates for run in _all(chosen.with_(series="halfway", rate=rate))]

    def _halfway_rate(self, cell: Cell) -> float | None:
        """Between the cell's chosen rate and the better of that one's neighbours (geometric mean)."""
        chosen = self.chosen(cell)
        if chosen is None:
            return None
        runs = self.choosing(cell)
        place = runs.index(chosen)
        better = max(runs[max(place - 1, 0) : place] + runs[place + 1 : place + 2], key=self._score)
        return float((chosen.rate * better.rate) ** 0.5)

    def causes(self, base: str) -> dict[str, tuple[list[Run], list[Run]]]:
        """A guess why AGVM does no more at the central batch -> (plain, what the guess is tried with), at their chosen rates.

        Larger multipliers also beside plain at its halfway rate, for to raise the heads' rates is to raise the rate a little.
        Empty while one of these is not known.
        """
        chosen = {method: self.chosen(Cell(base, method, CENTRAL_BATCH)) for method in ("plain", "pairwise", "fixed")}
        plain, pairwise, fixed = chosen.values()
        if plain is None or pairwise is None or fixed is None:
            return {}
        other = [run.with_(series="causes", norm=OTHER_NORM) for run in (plain, pairwise)]
        larger = {name: mu**POWER for name, mu in fixed.multipliers.items()}
        less_alike = fixed.with_(series="causes", multipliers=larger)
        name = f"less alike: fixed, multipliers to the power {POWER}"
        again, best = plain.with_(series="again"), self.best_plain(base, CENTRAL_BATCH)
        return {
            f"{OTHER_NORM} in the backbone: pairwise": (_few(other[0]), _few(other[1])),
            f"{plain.norm} there, on the same machine: pairwise": (
                _few(again),
                _few(pairwise.with_(series="ablation")),
            ),
            name: (_all(again), _all(less_alike)),
            f"{name} at {plain.rate:.3g}, over plain at {best[0].rate:.3g}": (best, _all(less_alike)),
        }

    def best_plain(self, base: str, batch: int) -> list[Run]:
        """Plain at its chosen rate; at the central batch once more, halfway to its better neighbour. None while not known."""
        cell = Cell(base, "plain", batch)
        if batch != CENTRAL_BATCH:
            return self.reported(cell)
        chosen, rate = self.chosen(cell), self._halfway_rate(cell)
        return _all(chosen.with_(series="again", rate=rate)) if chosen and rate else []

    def ablation(self, base: str) -> list[Run]:
        """AGVM with one setting changed, at its chosen rate."""
        chosen = self.chosen(Cell(base, "pairwise", CENTRAL_BATCH))
        if chosen is None:
            return []
        return [run for changed in ABLATION for run in _few(chosen.with_(series="ablation", changed=changed))]

    @cached_property
    def runs(self) -> list[Run]:
        """All runs that are known by now, in their order: first those that tell plain's rate at each batch."""
        found = [run for batch in BATCHES for base in MODULATED for run in self.choosing(Cell(base, "plain", batch))]
        modulated = [cell for cell in cells() if cell.base in MODULATED]
        found += self._first_series(cell for cell in modulated if cell.batch == CENTRAL_BATCH)
        centre = [Cell(base, method, CENTRAL_BATCH) for base in MODULATED for method in METHODS]
        found += [run for cell in centre if cell.method in METHODS_HALFWAY for run in self.halfway(cell)]
        for batch in reversed(BATCHES):
            equal = [replace(cell, batch=batch) for cell in centre if cell.method in METHODS_AT_EQUAL_UPDATES]
            found += [run for cell in equal for run in self.at_equal_updates(cell)]
        found += [run for base in MODULATED for pair in self.causes(base).values() for runs in pair for run in runs]
        found += self._first_series(modulated)
        found += [run for base in MODULATED for run in self.ablation(base)]
        found += self._first_series(cells())
        return list({run.key: run for run in found}.values())

    def _first_series(self, some: Iterable[Cell]) -> list[Run]:
        return [run for cell in some for run in (*self.choosing(cell), *self.reported(cell))]

    def to_do(self) -> list[Run]:
        """What is left of them."""
        return [run for run in self.runs if run.key not in self.known]


def _few(run: Run) -> list[Run]:
    return [run.with_(seed=seed) for seed in FEWER_SEEDS]


def _all(run: Run) -> list[Run]:
    return [run.with_(seed=seed) for seed in SEEDS]
