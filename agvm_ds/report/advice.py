"""How large a batch pays, from the measured noise scales: the model of McCandlish et al., arXiv 1812.06162, section 2.

With a critical batch size B (the gradient noise scale), training at batch b to the same loss takes S_min (1 + B / b) updates
and E_min (1 + b / B) images. So going from batch a to b needs (1 + B / a) / (1 + B / b) times fewer updates, and that is the
speed-up where an update of b images takes as long as one of a, on b / a times the GPUs.

B of a module is the mean noise over the mean signal (agvm_ds.variance.noise_and_signal) of the measures in a part of the
run; its interval comes from a moving-block bootstrap over them, for measures next to each other are alike. With an Adam
both are those of the preconditioned gradient. The model is of steps that are not the optimizer's alone, and says nothing of
generalization: it is a guide to where a sweep should look, not a result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agvm_ds.report.measures import Measures

BATCHES = (64, 128, 256, 512)
DRAWS = 2000
FEWEST = 10
"""Measures, below which nothing is said."""
ALL = "all modules"

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value with the interval that holds it with 95 % confidence."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Advice:
    """``critical``: module -> critical batch size in images, and of ALL together; ``speedups``: batch -> times faster.

    ``limits``: the module whose critical batch size is the smallest: beyond it that module's steps gain least.
    """

    batch: int
    measures: int
    critical: dict[str, Interval]
    speedups: dict[int, Interval]
    limits: str


def advise(measures: Measures, batch: int, batches: Sequence[int] = BATCHES, part: float = 0.5) -> Advice:
    """What the last ``part`` of a run's measures says of going from its ``batch`` to others.

    Raises ValueError where they are fewer than FEWEST, or have no noise and signal (the split estimator).
    """
    first = int(len(measures.updates) * (1 - part))
    columns = {
        name: (np.array(measures.noise[name][first:]), np.array(measures.signal[name][first:]))
        for name in measures.modules
    }
    columns = {name: pair for name, pair in columns.items() if np.isfinite(pair[0] + pair[1]).any()}
    count = len(measures.updates) - first
    if not columns:
        raise ValueError("no measure has noise and signal: they are the pairwise estimator's (agvm.estimator)")
    if count < FEWEST:
        raise ValueError(f"{count} measures in the last {part:.0%} of the run; at least {FEWEST} are needed")
    columns[ALL] = (sum_of(columns, 0), sum_of(columns, 1))
    picks = blocks(count)
    critical = {name: critical_batch(noise, signal, picks) for name, (noise, signal) in columns.items()}
    whole = critical[ALL]
    speedups = {
        other: Interval(*(speedup(value, batch, other) for value in (whole.value, whole.low, whole.high)))
        for other in batches
    }
    limits = min(measures.modules, key=lambda name: critical[name].value if name in critical else math.inf)
    return Advice(batch, count, critical, speedups, limits)


def sum_of(columns: Mapping[str, tuple[Array, Array]], which: int) -> Array:
    """Over the modules; in a measure in which one has none, over the others."""
    return np.nansum([pair[which] for pair in columns.values()], axis=0)


def blocks(count: int, draws: int = DRAWS) -> NDArray[np.int64]:
    """(draws, count) indices: each draw is made of runs of about sqrt(count) neighbours, from anywhere."""
    length = max(round(math.sqrt(count)), 1)
    starts = np.random.default_rng(0).integers(0, count - length + 1, (draws, -(-count // length)))
    return (starts[:, :, None] + np.arange(length)).reshape(draws, -1)[:, :count]


def critical_batch(noise: Array, signal: Array, picks: NDArray[np.int64]) -> Interval:
    """Mean noise over mean signal; infinite where the signal's mean is not above 0."""
    drawn = [ratio(n, s) for n, s in zip(_means(noise[picks]), _means(signal[picks]), strict=True)]
    low, high = np.quantile(drawn, [0.025, 0.975], method="inverted_cdf")
    return Interval(ratio(float(np.nanmean(noise)), float(np.nanmean(signal))), float(low), float(high))


def _means(draws: Array) -> Array:
    """Of each draw, over the measures that are defined; nan where none is."""
    defined = np.isfinite(draws)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(defined, draws, 0).sum(1) / defined.sum(1))


def ratio(noise: float, signal: float) -> float:
    """The critical batch size."""
    return float(noise / signal) if signal > 0 else math.inf


def speedup(critical: float, batch: int, other: int) -> float:
    """Updates to the same loss at ``batch`` over those at ``other``."""
    if math.isinf(critical):
        return other / batch
    return (1 + critical / batch) / (1 + critical / other)
