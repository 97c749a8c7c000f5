"""The study's tables, in Markdown, from its lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from statistics import fmean, stdev
from typing import Any

from agvm_ds.report.advice import ALL, ratio, speedup
from benchmarks.study.launch import BINS
from benchmarks.study.plan import DIVERGED, DONE, Cell, Line, Study, cells
from benchmarks.study.protocol import (
    ALONE,
    BASE_BATCH,
    BATCHES,
    BATCHES_ALONE,
    CENTRAL_BATCH,
    EPOCHS,
    IMAGES,
    METHODS_HALFWAY,
    MODULATED,
    SEEDS,
    STEPS,
    Run,
)

NONE = ""
AGAIN = "nothing, again"
MIDDLE = slice(BINS // 4, 3 * BINS // 4)
"""Half of a run's BINS."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def methods() -> list[tuple[str, str]]:
    """(base, method), each once."""
    return list(dict.fromkeys((cell.base, cell.method) for cell in sorted(cells(), key=lambda cell: _rank(cell.base))))


def _rank(base: str) -> int:
    return [*MODULATED, *ALONE].index(base)


def title(base: str, method: str) -> str:
    """A row's: "SGD, pairwise"."""
    return base if method == "plain" else f"{base}, {method}"


def scores(study: Study, runs: Sequence[Run]) -> list[float]:
    """mAP on the set to report, of those that are done."""
    return [float(study.known[run.key]["report"]) for run in runs if run.key in study.known]


def spread(values: Sequence[float]) -> str:
    """Mean, standard deviation, and how many if not four."""
    if not values:
        return NONE
    few = "" if len(values) == len(SEEDS) else f" ({len(values)})"
    return f"{fmean(values):.3f} ± {stdev(values):.3f}{few}" if len(values) > 1 else f"{values[0]:.3f} (1)"


def reported(study: Study) -> str:
    """Method x batch, with its updates: mAP, and the rate that was chosen."""
    head = [f"{batch} ({EPOCHS * IMAGES // batch:,} updates)" for batch in BATCHES]
    return _method_by_batch(head, study, study.reported, lambda cell: cell)


def at_equal_updates(study: Study) -> str:
    """The same with as many updates at every batch."""
    return _method_by_batch(
        [*map(str, BATCHES)], study, study.at_equal_updates, lambda cell: replace(cell, batch=CENTRAL_BATCH)
    )


RunsOf = Callable[[Cell], Sequence[Run]]


def _method_by_batch(head: Sequence[str], study: Study, runs_of: RunsOf, chosen_at: Callable[[Cell], Cell]) -> str:
    def text(cell: Cell) -> str:
        found = spread(scores(study, runs_of(cell)))
        return f"{found} at {_rate(study, chosen_at(cell))}" if found else found

    rows = [[title(*one), *(text(Cell(*one, batch)) for batch in BATCHES)] for one in methods()]
    return table(["method", *head], [row for row in rows if any(row[1:])])


def _rate(study: Study, cell: Cell) -> str:
    """The chosen one, with a star at an edge of what was tried, where more than one was."""
    tried, chosen = [run.rate for run in study.choosing(cell)], study.chosen(cell)
    if chosen is None:
        return NONE
    return f"{chosen.rate:.3g}{'*' if len(tried) > 1 and chosen.rate in (tried[0], tried[-1]) else ''}"


def differences(study: Study, runs_of: RunsOf) -> str:
    """What each method has over plain and over fixed, seed by seed: mean and its standard error."""
    rows = []
    for base in MODULATED:
        for method, other in (("pairwise", "plain"), ("split", "plain"), ("fixed", "plain"), ("pairwise", "fixed")):
            pairs = [[runs_of(Cell(base, one, batch)) for one in (method, other)] for batch in BATCHES]
            rows.append([f"{title(base, method)} over {other}", *(gain(study, *pair) for pair in pairs)])
    return table(["", *map(str, BATCHES)], [row for row in rows if any(row[1:])])


def layerwise(study: Study) -> str:
    """What LARS and LAMB have over plain bases at their best rates, seed by seed."""
    rows = []
    for name, base in product(ALONE, MODULATED):
        pairs = [(study.reported(Cell(name, "plain", b)), study.best_plain(base, b)) for b in BATCHES_ALONE]
        rows.append([f"{name} over {base}", *(gain(study, *pair) for pair in pairs)])
    return table(["", *map(str, BATCHES_ALONE)], [row for row in rows if any(row[1:])])


def gain(study: Study, mine: Sequence[Run], theirs: Sequence[Run]) -> str:
    """Mean difference of the seeds that both have, and its standard error."""
    both = [pair for pair in zip(mine, theirs, strict=False) if all(run.key in study.known for run in pair)]
    if len(both) < 2:
        return NONE
    gains = [a - b for a, b in (scores(study, pair) for pair in both)]
    return f"{fmean(gains):+.3f} ± {stdev(gains) / len(gains) ** 0.5:.3f}"


def halfway(study: Study) -> str:
    """Methods at the central batch by rate, chosen or halfway; pairwise's gain over plain, and that of plain's next rate."""
    rows = []
    for base in MODULATED:
        cells_ = [Cell(base, method, CENTRAL_BATCH) for method in METHODS_HALFWAY]
        runs = [[*study.reported(cell), *study.halfway(cell)] for cell in cells_]
        rates = sorted({run.rate for some in runs for run in some})
        by_rate = [[[run for run in some if run.rate == rate] for some in runs] for rate in rates]
        nothing: list[list[Run]] = [[], []]
        for rate, pair, higher in zip(rates, by_rate, [*by_rate[1:], nothing], strict=True):
            gains = gain(study, *pair[::-1]), gain(study, higher[0], pair[0])
            rows.append([base, f"{rate:.3g}", *(spread(scores(study, one)) for one in pair), *gains])
    head = ["base", "rate", *METHODS_HALFWAY, "gain", "plain's by the next rate"]
    return table(head, [row for row in rows if any(row[2:])])


def tried(study: Study) -> str:
    """All rates of all cells, those of an earlier protocol too: mAP on the set to choose by, seed 0."""
    rows = []
    searched = (Cell(base, "plain", batch) for base in MODULATED for batch in BATCHES)
    for cell in sorted(dict.fromkeys([*cells(), *searched]), key=lambda cell: (_rank(cell.base), cell.batch)):
        lines = sorted(study.first_runs(cell), key=lambda line: float(line["run"]["rate"]))
        found = ", ".join(f"{line['run']['rate']:.3g}: {_choice(line)}" for line in lines)
        if found:
            rows.append([title(cell.base, cell.method), str(cell.batch), found])
    return table(["method", "batch", "rate: mAP on `choose`"], rows)


def _choice(line: Line) -> str:
    return "diverged" if line["status"] == DIVERGED else f"{line['choose']:.3f}"


def ablation(study: Study) -> str:
    """What was changed: mAP, and what that gains seed by seed, over the same runs with nothing changed."""
    rows = []
    for base in MODULATED:
        groups: dict[str, list[Run]] = {}
        for run in study.ablation(base):
            what = ", ".join(f"{key} = {value}" for key, value in run.changed.items()) or AGAIN
            groups.setdefault(what, []).append(run)
        first, again = study.reported(Cell(base, "pairwise", CENTRAL_BATCH)), groups.get(AGAIN, [])
        rows.append([base, "nothing", spread(scores(study, first)), NONE])
        for what, runs in groups.items():
            rows.append([base, what, spread(scores(study, runs)), gain(study, runs, first if runs == again else again)])
    return table(["base", "changed", "mAP", "gain"], [row for row in rows if row[2]])


def causes(study: Study) -> str:
    """A guess why AGVM does no more: mAP without and with what it is tried with, and the gain seed by seed."""
    rows = []
    for base in MODULATED:
        for guess, pair in study.causes(base).items():
            rows.append([base, guess, *(spread(scores(study, runs)) for runs in pair), gain(study, pair[1], pair[0])])
    return table(["base", "tried", "plain", "with it", "gain"], [row for row in rows if row[3]])


def factors(study: Study) -> str:
    """Mean scale factor of each module, of the pairwise run with the choosing seed."""
    rows = []
    for base in MODULATED:
        for batch in BATCHES:
            line = study.chosen_line(Cell(base, "pairwise", batch))
            if line:
                means = line["mean_scale_factors"]
                rows.append([base, str(batch), ", ".join(f"{name} {mu:.2f}" for name, mu in means.items())])
    return table(["base", "batch", "mean scale factor"], rows)


def critical(study: Study) -> str:
    """Noise scale of each module over a plain run, by quarters: the critical batch size that it predicts."""
    quarters = [slice(k * BINS // 4, (k + 1) * BINS // 4) for k in range(4)]
    rows = []
    for base in MODULATED:
        for batch in BATCHES:
            line = study.chosen_line(Cell(base, "plain", batch))
            if line is None:
                continue
            measures = line["measures"]
            for name, modules in [*((name, [columns]) for name, columns in measures.items()), (ALL, measures.values())]:
                rows.append([base, str(batch), name, *(f"{noise_scale(modules, part):.3g}" for part in quarters)])
    return table(["base", "batch", "module", "first quarter", "second", "third", "last"], rows)


def variances(lines_of: Callable[[Cell], Sequence[Line]]) -> str:
    """Mean variance of each module in the middle half of plain runs, and in brackets over the anchor's."""
    rows = []
    for base in MODULATED:
        columns = [_middles(lines_of(Cell(base, "plain", batch))) for batch in BATCHES]
        for name in dict.fromkeys(name for column in columns for name in column):
            found = [f"{c[name]:.2f} ({ratio(c[name], next(iter(c.values()))):.2f})" if c else NONE for c in columns]
            rows.append([base, name, *found])
    return table(["base", "module", *map(str, BATCHES)], rows)


def _middles(lines: Sequence[Line]) -> dict[str, float]:
    """Module -> mean over some runs."""
    names = lines[0]["measures"] if lines else ()
    return {name: fmean(_middle(line["measures"][name]["variance"]) for line in lines) for name in names}


def _middle(values: Sequence[float | None]) -> float:
    return fmean(value for value in values[MIDDLE] if value is not None)


def noise_scale(modules: Iterable[Mapping[str, Any]], part: slice) -> float:
    """Noise over signal of some modules together, in a part of a run's BINS."""
    sums = (
        sum(float(value) for columns in modules for value in columns[key][part] if value is not None)
        for key in ("noise", "signal")
    )
    return ratio(*sums)


def onset(study: Study) -> str:
    """The plain run's mAP at each batch beside how many times the base batch's images it needs by the noise scale there.

    The noise scale is that of all modules at the base batch, in the middle half of its run.
    """
    rows = []
    for base in MODULATED:
        first = study.chosen_line(Cell(base, "plain", BASE_BATCH))
        if first is None:
            continue
        critical = noise_scale(first["measures"].values(), MIDDLE)
        row = [base, f"{critical:.3g}"]
        for batch in BATCHES:
            line = study.chosen_line(Cell(base, "plain", batch))
            images = batch / BASE_BATCH / speedup(critical, BASE_BATCH, batch)
            row.append(f"{line['report']:.3f} ({images:.2f})" if line else NONE)
        rows.append(row)
    return table(["base", "critical batch size", *map(str, BATCHES)], rows)


SMOOTH = 5
"""Logged losses that are averaged."""
LEAST = 0.25
"""Share by which both losses must fall."""


def sweep(study: Study) -> str:
    """How many times fewer updates a larger batch needs from one loss to a lower one, and what the noise scale predicts.

    Of the plain runs that were chosen, each batch beside the base batch: between the losses that both have after their
    highest (a detector without proposals has a small loss) and before their rates fall, where they fall by LEAST at least.
    The noise scale is the base batch's there.
    """
    rows = []
    for base in MODULATED:
        first = study.chosen_line(Cell(base, "plain", BASE_BATCH))
        for batch in BATCHES:
            line = study.chosen_line(Cell(base, "plain", batch))
            gain = _gain(first, line, batch) if first and line and batch != BASE_BATCH else None
            if gain:
                rows.append([base, str(batch), *gain])
    return table(["base", "batch", "losses", f"updates at {BASE_BATCH}", "updates", "times fewer", "predicted"], rows)


def _gain(first: Line, other: Line, batch: int) -> list[str] | None:
    curves = falling(first), falling(other)
    high, low = min(curve[0][1] for curve in curves), max(min(loss for _, loss in curve) for curve in curves)
    if low > (1 - LEAST) * high:
        return None
    spans = [[next(update for update, loss in curve if loss <= level) for level in (high, low)] for curve in curves]
    here, there = (end - begin for begin, end in spans)
    part = slice(*(round(update * BINS / first["updates"]) for update in spans[0]))
    critical = noise_scale(first["measures"].values(), slice(part.start, max(part.stop, part.start + 1)))
    fewer = [f"{ratio(here, there):.2f}", f"{speedup(critical, BASE_BATCH, batch):.2f}"]
    return [f"{high:.2f} to {low:.2f}", str(here), str(there), *fewer]


def falling(line: Line) -> list[tuple[int, float]]:
    """(update, loss) from the highest loss until the rate falls, each the mean of SMOOTH logged ones around it."""
    logged = [(int(update), float(loss)) for update, loss in line["loss"] if update <= STEPS[0] * line["updates"]]
    windows = [logged[k : k + SMOOTH] for k in range(max(len(logged) - SMOOTH + 1, 1))]
    means = [(window[len(window) // 2][0], fmean(loss for _, loss in window)) for window in windows]
    return means[means.index(max(means, key=lambda point: point[1])) :]


def estimators(rows: Sequence[Mapping[str, Any]]) -> str:
    """Pairwise and split beside the truth."""
    cells_ = [
        [
            str(row["epoch"]),
            row["module"],
            str(row["n"]),
            f"{row['variance']:.3f}",
            *(f"{row['bias'][name]:+.3f} ± {row['spread'][name]:.3f}" for name in ("pairwise", "split")),
            f"{row['fewer']:.1f}",
        ]
        for row in rows
    ]
    return table(["epoch", "module", "n", "variance", "pairwise: bias ± spread", "split", "fewer measures"], cells_)


def ended(lines: Sequence[Line]) -> str:
    """How many runs of each end, and what they took."""
    counts: Callable[[str], int] = lambda status: sum(line["status"] == status for line in lines)  # noqa: E731
    hours = sum(line["seconds"] for line in lines) / 3600
    left = len(Study(lines).to_do())
    return (
        f"{counts(DONE)} runs done, {counts(DIVERGED)} diverged, {len(lines) - counts(DONE) - counts(DIVERGED)} failed "
        f"and were taken again; {hours:.1f} core-hours. "
        f"{f'{left} of those known by now are still to do' if left else 'None is left to do'}."
    )
