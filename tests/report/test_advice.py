"""The critical batch size of problems whose noise scale is known in closed form, and the speed-up it predicts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from agvm_ds.report.advice import ALL, advise, speedup
from agvm_ds.report.measures import Measures
from agvm_ds.variance import noise_and_signal

MODULES = {"backbone": (64, 1.0, 0.5), "head": (16, 2.0, 2.0)}
"""Name -> elements d, standard deviation s of an image's gradient in each, length |G| of the true one: B = d s^2 / |G|^2."""


def synthetic(updates: int, n: int, images: int, seed: int = 0) -> Measures:
    """What a run measures whose images' gradients are drawn from normal distributions around a true gradient."""
    random = np.random.default_rng(seed)
    noise: dict[str, list[float]] = {name: [] for name in MODULES}
    signal: dict[str, list[float]] = {name: [] for name in MODULES}
    for name, (d, s, length) in MODULES.items():
        true = np.full(d, length / math.sqrt(d))
        for _ in range(updates):
            micro = true + random.normal(0, s / math.sqrt(images), (n, d))
            found = noise_and_signal(float((micro**2).sum()), float((micro.mean(0) ** 2).sum()), n, images)
            noise[name].append(found[0])
            signal[name].append(found[1])
    nothing = {name: [math.nan] * updates for name in MODULES}
    return Measures(
        "backbone", list(range(updates)), [0.0] * updates, nothing, nothing, nothing, nothing, nothing, noise, signal
    )


@pytest.mark.parametrize(("n", "images"), [(8, 16), (32, 4), (2, 64)])
def test_the_critical_batch_size_is_that_of_the_closed_form(n: int, images: int) -> None:
    found = advise(synthetic(4000, n, images), n * images, part=1.0)
    closed = {name: d * s**2 / length**2 for name, (d, s, length) in MODULES.items()}
    closed[ALL] = sum(d * s**2 for d, s, _ in MODULES.values()) / sum(length**2 for *_, length in MODULES.values())
    for name, value in closed.items():
        one = found.critical[name]
        assert one.value == pytest.approx(value, rel=0.1), name
        assert one.low < one.value < one.high
    assert found.limits == "head", "16 against 256 images"
    assert found.measures == 4000


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    closed = 16.0
    inside = 0
    for seed in range(60):
        one = advise(synthetic(200, 8, 8, seed), 64, part=1.0).critical["head"]
        inside += one.low <= closed <= one.high
    assert 50 <= inside <= 60, "95 % of 60 are 57"


def test_the_last_part_counts() -> None:
    early, late = synthetic(300, 8, 16), synthetic(300, 8, 16, 1)
    both = Measures(
        "backbone",
        list(range(600)),
        [0.0] * 600,
        *[{name: [math.nan] * 600 for name in MODULES}] * 5,
        {name: [50 * value for value in early.noise[name]] + late.noise[name] for name in MODULES},
        {name: early.signal[name] + late.signal[name] for name in MODULES},
    )
    assert advise(both, 128).critical == advise(late, 128, part=1.0).critical


def test_the_speed_up_has_its_two_ends() -> None:
    assert speedup(1e9, 32, 512) == pytest.approx(16, rel=1e-5), "all noise: as many times as the batch"
    assert speedup(math.inf, 32, 512) == 16
    assert speedup(1e-9, 32, 512) == pytest.approx(1), "no noise: nothing is gained"
    assert speedup(512, 512, 1024) == pytest.approx(2 / 1.5)
    found = advise(synthetic(400, 8, 16), 128, [128, 256], part=1.0)
    assert found.speedups[128].value == found.speedups[128].low == 1.0
    assert 1 < found.speedups[256].low < found.speedups[256].value < found.speedups[256].high < 2


def test_a_signal_of_nothing_is_infinite() -> None:
    measures = synthetic(100, 4, 4)
    measures.signal["head"][:] = [-1.0, 0.5] * 50
    assert math.isinf(advise(measures, 16, part=1.0).critical["head"].value)


def test_a_measure_that_a_module_has_not_leaves_the_module_in() -> None:
    whole, holes = synthetic(400, 8, 16), synthetic(400, 8, 16)
    for column in (holes.noise["head"], holes.signal["head"]):
        column[::7] = [math.nan] * len(column[::7])
    found, right = advise(holes, 128, part=1.0), advise(whole, 128, part=1.0)
    assert found.critical["head"].value == pytest.approx(right.critical["head"].value, rel=0.05)
    assert found.critical["backbone"] == right.critical["backbone"]
    assert found.limits == "head"


def test_too_few_measures_and_none_with_a_signal_are_refused() -> None:
    with pytest.raises(ValueError, match="6 measures in the last 50% of the run; at least 10"):
        advise(synthetic(12, 4, 4), 16)
    measures = synthetic(40, 4, 4)
    for name in MODULES:
        measures.noise[name][:] = [math.nan] * 40
    with pytest.raises(ValueError, match="they are the pairwise estimator's"):
        advise(measures, 16)
