"""Warnings of a run that does not go well: each when it should, once, and none of a run that is well."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest

from agvm_ds.config import AGVMConfig
from agvm_ds.controller import Measure
from agvm_ds.health import LONG, WINDOW, Health, schedule_warnings, standard_error
from agvm_ds.variance import moving_average, variance_ratio

ANCHOR, HEAD = "backbone", "head"


class Told:
    """A run of given variances, through the formulas, and what Health says of it."""

    def __init__(self, **block: Any) -> None:
        self.config = AGVMConfig(**block)
        self.said: list[str] = []
        shards = SimpleNamespace(micro_batches=2)
        controller: Any = SimpleNamespace(config=self.config, anchor=ANCHOR, modules=[ANCHOR, HEAD], shards=shards)
        self.health = Health(controller, lambda text, *values: self.said.append(text % values))
        self.factor = 1.0

    def measure(self, update: int, anchor: float, head: float) -> None:
        """A measure of these variances."""
        ratio = math.nan
        if not math.isnan(head):
            ratio = variance_ratio(anchor, head, self.config.eps, self.config.ratio_bounds)
            self.factor = moving_average(self.factor, ratio, self.config.ema_decay)
        of = {ANCHOR: anchor, HEAD: head}
        factors, ratios = {ANCHOR: 1.0, HEAD: self.factor}, {ANCHOR: 1.0, HEAD: ratio}
        self.health(Measure(update, of, of, ratios, factors, of, of))


def test_a_healthy_run_is_not_spoken_of() -> None:
    told = Told()
    rng = random.Random(0)
    for update in range(500):
        told.measure(update, 0.5 + rng.uniform(-0.05, 0.05), 0.3 + rng.uniform(-0.05, 0.05))
    assert told.said == []


def test_a_scale_factor_at_its_bound_for_long_is_said_once() -> None:
    told = Told(ema_decay=0.5)
    reached = 0
    for update in range(3 * LONG):
        told.measure(update, 0.9, 0.01)
        reached = reached or (update if abs(told.factor - math.sqrt(10)) < 0.02 * math.sqrt(10) else 0)
        assert bool(told.said) == (bool(reached) and update >= reached + LONG - 1)
    (text,) = told.said
    assert "head has been at its bound 3.16 for 50 measures" in text and "far below the anchor's" in text


def test_bounds_of_one_hold_nothing_back() -> None:
    told = Told(ratio_bounds=(1.0, 1.0))
    for update in range(2 * LONG):
        told.measure(update, 0.9, 0.01)
    assert told.said == []


def test_modules_that_drift_apart_are_said_once() -> None:
    told = Told()
    for update in range(10 * WINDOW):
        told.measure(update, 0.5, 0.5 if update < 3 * WINDOW else 0.05)
    assert [text for text in told.said if "drift" in text] == told.said and len(told.said) == 1
    assert "over the anchor's was 1 and is 0.1" in told.said[0]


def test_a_module_that_is_never_measured() -> None:
    told = Told()
    for update in range(2 * WINDOW):
        told.measure(update, 0.5, math.nan)
    (text,) = told.said
    assert "module head has had no variance in any of 20 measures" in text


def test_scale_factors_of_noise_are_said_with_their_standard_error() -> None:
    told = Told(ema_decay=0.0)
    for update in range(2 * WINDOW):
        told.measure(update, 0.5, 0.3 if update % 2 else 1.2)
    (text,) = told.said
    assert "n = 2 micro-batches" in text and "standard error of 0.41" in text


def test_the_standard_error_is_that_of_independent_draws_and_of_no_trend() -> None:
    rng = random.Random(1)
    noise: Any = [rng.gauss(0, 0.3) for _ in range(20000)]
    assert standard_error(noise) == pytest.approx(0.3, rel=0.03)
    trend: Any = [value + index / 1000 for index, value in enumerate(noise)]
    assert standard_error(trend) == pytest.approx(0.3, rel=0.03)


@pytest.mark.parametrize(
    ("block", "updates", "warm_up", "words"),
    [
        ({"interval": 10, "start_step": 0}, 1000, 0, ""),
        ({"interval": 10, "start_step": 500}, 400, 0, "no update of this run is measured"),
        ({"interval": 100}, 1000, 0, "has 10 measures, and the moving average remembers 33"),
        ({"interval": 100, "ema_decay": 0.5}, 1000, 0, ""),
        ({"interval": 1, "start_step": 10}, 1000, 50, "start_step = 10 is within the warm-up of 50"),
        ({"interval": 1, "start_step": 10, "modulate": False}, 1000, 50, ""),
        ({"interval": 1, "stop_step": 40}, 1000, 0, "has 41 measures"),
    ],
)
def test_a_block_that_does_not_suit_the_schedule(block: dict[str, Any], updates: int, warm_up: int, words: str) -> None:
    found = schedule_warnings(AGVMConfig(**block), updates, warm_up)
    assert len(found) == bool(words)
    assert not words or words in found[0]
