"""Warnings about a run that does not go well, or that AGVM's settings do not suit; each is said once.

What is watched while it trains is counted from the start of the process, so after a resume it begins anew.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from agvm_ds.config import AGVMConfig
from agvm_ds.controller import Controller, Measure
from agvm_ds.variance import factor_bounds

logger = logging.getLogger("agvm_ds")

WINDOW = 20
"""Measures that are judged together."""
LONG = 50
"""Measures in a row with a scale factor at its bound."""
NEAR = 0.02
"""Share of a bound within which a scale factor, which only comes near it, is at it."""
DRIFT = 4.0
"""Times that a module's variance over the anchor's may grow or fall, medians of WINDOW measures, before it is said."""
NOISE = 0.1
"""Standard error of a scale factor, as a share of it, from which on it is noise."""
FEWEST = 3.0
"""Memories of the moving average that a run must have in measures: fewer, and the scale factors hardly follow."""


class Health:
    """A listener of a controller, which warns on rank 0.

    Of a scale factor that stays at its bound; of a module whose variance drifts away from the anchor's (the paper's sign of
    a large batch in trouble, section 3); of one that is never measured; of scale factors that are mostly noise.
    ``say``: what a warning is handed to, with the values for its placeholders.
    """

    def __init__(self, controller: Controller, say: Callable[..., Any] = logger.warning) -> None:
        self.controller = controller
        self.say = say
        self._said: set[tuple[str, str]] = set()
        names = controller.modules
        self._at_bound = dict.fromkeys(names, 0)
        self._recent: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in names}
        """Variance over the anchor's."""
        self._first: dict[str, float] = {}
        self._ratios: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in names}
        self._defined = dict.fromkeys(names, 0)
        self._measures = 0

    def __call__(self, measure: Measure) -> None:
        """Take in a measure, and warn."""
        self._measures += 1
        for name in self.controller.modules:
            for kind, text in self._found(name, measure):
                if (kind, name) not in self._said:
                    self._said.add((kind, name))
                    self.say("AGVM, update %d: %s", measure.update, text)

    def _found(self, name: str, measure: Measure) -> Iterator[tuple[str, str]]:
        self._defined[name] += not math.isnan(measure.variances[name])
        if self._measures == WINDOW and not self._defined[name]:
            yield (
                "unmeasured",
                f"module {name} has had no variance in any of {WINDOW} measures: no gradient reaches it, and its scale "
                "factor stays as it is",
            )
        if name == self.controller.anchor or math.isnan(measure.ratios[name]):
            return
        yield from self._bound(name, measure.scale_factors[name])
        yield from self._drift(name, measure)
        yield from self._noise(name, measure)

    def _bound(self, name: str, factor: float) -> Iterator[tuple[str, str]]:
        low, high = factor_bounds(self.controller.config.ratio_bounds)
        at = next((b for b in (low, high) if low < high and abs(factor - b) <= NEAR * b), None)
        self._at_bound[name] = 0 if at is None else self._at_bound[name] + 1
        if at is not None and self._at_bound[name] >= LONG:
            side = "above" if at == low else "below"
            yield (
                "bound",
                f"the scale factor of {name} has been at its bound {at:.3g} for {LONG} measures: the module's variance is "
                f"far {side} the anchor's, further than agvm.ratio_bounds = {list(self.controller.config.ratio_bounds)} "
                "follow",
            )

    def _drift(self, name: str, measure: Measure) -> Iterator[tuple[str, str]]:
        eps = self.controller.config.eps
        recent = self._recent[name]
        recent.append((measure.variances[name] + eps) / (measure.variances[self.controller.anchor] + eps))
        if len(recent) < WINDOW:
            return
        now = statistics.median(recent)
        then = self._first.setdefault(name, now)
        if not 1 / DRIFT <= now / then <= DRIFT:
            yield (
                "drift",
                f"the gradient variance of {name} over the anchor's was {then:.3g} and is {now:.3g}: modules drift apart, "
                "as before a large batch diverges; look at the loss, and lower the learning rate if it rises",
            )

    def _noise(self, name: str, measure: Measure) -> Iterator[tuple[str, str]]:
        ratios = self._ratios[name]
        ratios.append(measure.ratios[name])
        if len(ratios) < WINDOW:
            return
        single = standard_error(ratios)
        decay = self.controller.config.ema_decay
        error = single * math.sqrt((1 - decay) / (1 + decay))
        if error > NOISE * measure.scale_factors[name]:
            yield (
                "noise",
                f"one measure of the ratio of {name} has a standard error of {single:.2g}, its scale factor "
                f"{measure.scale_factors[name]:.3g} one of {error:.2g}: with n = {self.controller.shards.micro_batches} "
                "micro-batches an update the estimate is mostly noise; use more micro-batches, or a larger agvm.ema_decay",
            )


def standard_error(values: deque[float]) -> float:
    """Of one value, from the differences of successive ones, which a slow change of what is measured hardly touches."""
    pairs = list(zip(list(values)[1:], values, strict=False))
    return math.sqrt(statistics.fmean((a - b) ** 2 for a, b in pairs) / 2)


def schedule_warnings(config: AGVMConfig, updates: int, warm_up: int) -> list[str]:
    """What does not fit in the block for a run of so many updates, the first ``warm_up`` of which warm the rate up."""
    measures = len(config.measures(updates))
    found = []
    if not measures:
        return [
            f"agvm: no update of this run is measured: it has {updates}, start_step is {config.start_step}, stop_step "
            f"{config.stop_step}, interval {config.interval}"
        ]
    if measures < FEWEST * config.memory:
        found.append(
            f"agvm.interval = {config.interval}: the run has {measures} measures, and the moving average remembers "
            f"{config.memory:.0f} (ema_decay = {config.ema_decay}): scale factors will hardly follow; measure more often, or "
            "lower ema_decay"
        )
    if config.start_step < warm_up and config.modulate:
        found.append(
            f"agvm.start_step = {config.start_step} is within the warm-up of {warm_up} updates, where gradients are unlike "
            f"later ones; the paper starts after it: {warm_up} or more"
        )
    return found
