"""Scale factors stay finite and inside [sqrt(low), sqrt(high)], whatever the ranks' sums are."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import agvm_ds
from agvm_ds.config import AGVMConfig, ConfigError
from agvm_ds.controller import Controller
from agvm_ds.estimators.base import Estimator
from agvm_ds.variance import factor_bounds, moving_average, pairwise_variance, split_variance, variance_ratio
from tests.engines import heard
from tests.toy import MODULES, Toy

ODD = [
    0.0,
    -0.0,
    math.nan,
    math.inf,
    -math.inf,
    5e-324,
    1e-310,
    1e-160,
    1e-45,
    1e38,
    3.5e38,
    1e154,
    1e200,
    1.7e308,
    -1.0,
    1.0,
]
BOUNDS = [(0.5, 10.0), (1.0, 1.0), (1e-300, 1e300), (0.3, 1.0), (1.0, 7.7)]
WAYS = [(base, estimator) for base in (torch.optim.SGD, torch.optim.AdamW) for estimator in ("pairwise", "split")]


def numbers(seed: int) -> Iterator[float]:
    """Odd ones and ordinary ones of any size."""
    generator = random.Random(seed)
    while True:
        odd = generator.choice(ODD)
        yield odd if generator.random() < 0.3 else generator.uniform(-0.1, 1) * 10 ** generator.uniform(-40, 40)


def ordinary(seed: int) -> Iterator[float]:
    """What sums of squares are."""
    generator = random.Random(seed)
    while True:
        yield 10 ** generator.uniform(-6, 6)


class FakeShards:
    """One process in which the sums of a measure are put in the place of the ranks'."""

    ranks, rank, accumulation, micro_batches, loss_scale, stale = 2, 0, 1, 2, 1.0, False

    def __init__(self, model: Toy, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.engine = SimpleNamespace(
            device="cpu", micro_steps=0, module=model, train_micro_batch_size_per_gpu=lambda: 4, global_steps=0
        )
        self.sums = torch.zeros(0)

    def fragments(self) -> list[Any]:
        return [None for _ in self.optimizer.owned]

    def pieces(self, absent: Any = ()) -> list[Any]:
        return []

    def zeros(self) -> list[Any]:
        return [torch.zeros(1)]

    def add_up(self, sums: torch.Tensor) -> torch.Tensor:
        """Behind them how many ranks miss something: none."""
        return torch.cat([self.sums, self.sums.new_zeros(1)]) if sums.dtype == torch.float64 else sums


def controller(base: Any = torch.optim.SGD, **block: Any) -> Controller:
    model = Toy()
    optimizer = agvm_ds.AGVM(agvm_ds.param_groups(model, modules=MODULES), base=base, lr=0.1)
    config = AGVMConfig.model_validate({"interval": 1, **block})
    return Controller(config, optimizer, FakeShards(model, optimizer))  # type: ignore[arg-type]


def measured(agvm: Controller, t: int, values: Iterator[float]) -> dict[str, float]:
    """The scale factors after a measured update with these sums."""
    agvm._micro_batches = 1
    rows = agvm._estimator.local_sums().numel()
    agvm.shards.sums = torch.tensor([next(values) for _ in range(rows)], dtype=torch.float64)  # type: ignore[attr-defined]
    agvm.finish(t, agvm.measure(t))
    return agvm.scale_factors


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize(("base", "estimator"), WAYS)
def test_scale_factors_stay_inside_the_bounds(base: Any, estimator: str, bounds: tuple[float, float]) -> None:
    low, high = factor_bounds(bounds)
    for decay in (0.0, 0.5, 0.97, 1.0):
        agvm = controller(base, estimator=estimator, ratio_bounds=bounds, ema_decay=decay)
        odd, usual, seen = numbers(0), ordinary(0), set()
        for t in range(300):
            factors = measured(agvm, t, odd if t % 3 else usual)
            assert all(low <= mu <= high for mu in factors.values()), (t, factors)
            seen |= set(factors.values())
        assert 100 <= agvm.measured < 300
        assert (seen == {1.0}) is (bounds == (1.0, 1.0) or decay == 1.0)


@pytest.mark.parametrize(("base", "estimator"), WAYS)
def test_unusable_sums_change_nothing(base: Any, estimator: str) -> None:
    agvm = controller(base, estimator=estimator)
    before = dict(measured(agvm, 0, (1.0 + 0.01 * i for i in range(1000))))
    for t, bad in enumerate((math.nan, math.inf, -math.inf), start=1):
        rows = agvm._estimator.local_sums().numel()
        for place in range(rows):
            values = [1.0] * place + [bad] + [1.0] * rows
            assert measured(agvm, t, iter(values)) == before
    assert agvm.measured == 1


def test_a_squared_norm_that_overflows_fp32_is_unusable() -> None:
    class Sums(Estimator):
        def squares(self, sums: torch.Tensor) -> torch.Tensor:
            return sums

    Sums.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    usable = Sums.__new__(Sums).usable  # type: ignore[abstract]
    assert usable(torch.tensor([3e38, 1e30], dtype=torch.float64))
    assert not usable(torch.tensor([3e38, 3e38], dtype=torch.float64))


def test_the_formulas_raise_nothing_and_leave_no_range() -> None:
    values, low, high = numbers(3), *factor_bounds((0.5, 10.0))
    mu = 1.0
    for _ in range(20_000):
        phis = (
            pairwise_variance(next(values), next(values), 4),
            split_variance(next(values), next(values), next(values)),
        )
        assert all(math.isnan(phi) or 0 <= phi <= 2 for phi in phis)
        if not math.isnan(sum(phis)):
            mu = moving_average(mu, variance_ratio(*phis, 1e-6, (0.5, 10.0)), 0.5)
        assert low <= mu <= high


def test_the_moving_average_lies_between_what_it_averages() -> None:
    """Once an ulp outside: 1 + (r - 1) is not always r."""
    generator = random.Random(0)
    for _ in range(20_000):
        mu, ratio = generator.uniform(0.7, 3.2), math.sqrt(generator.uniform(0.5, 10))
        decay = generator.choice([0.0, 1e-17, generator.random()])
        assert min(mu, ratio) <= moving_average(mu, ratio, decay) <= max(mu, ratio)


@pytest.mark.parametrize("mu", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_a_state_with_a_scale_factor_that_is_none_is_refused(mu: float) -> None:
    agvm = controller()
    agvm.optimizer.param_groups[0]["lr"] = 0.5
    state = controller().state_dict()
    state["scale_factors"]["neck"] = mu
    with pytest.raises(ConfigError, match="must be finite and above 0; these are not: {'neck': "):
        agvm.load_state_dict(state)
    assert agvm.scale_factors["neck"] == 1.0
    assert agvm.optimizer.param_groups[0]["lr"] == 0.5, "nothing of it is taken over"


def test_a_state_of_wider_bounds_is_put_within_this_runs() -> None:
    state = controller(ratio_bounds=[0.01, 100.0]).state_dict()
    state["scale_factors"] |= {"neck": 9.0, "rpn_head": 0.2, "roi_head": 1.25}
    agvm = controller(ratio_bounds=[0.5, 4.0])
    with heard() as messages:
        agvm.load_state_dict(state)
    kept = {name: mu for name, mu in agvm.scale_factors.items() if mu != 1.0}
    assert kept == {"neck": 2.0, "rpn_head": math.sqrt(0.5), "roi_head": 1.25}
    assert len(messages) == 1
    assert "this run's agvm.ratio_bounds = [0.5, 4.0]: neck 9 -> 2, rpn_head 0.2 -> 0.707107" in messages[0]


def test_a_setting_that_is_a_tensor_stays_that_tensor() -> None:
    """As timm's LAMB counts its steps in its groups; it could not be resumed."""
    saved = controller()
    saved.optimizer.param_groups[0] |= {"step": torch.tensor(7.0), "lr": 0.5}
    agvm = controller()
    step = torch.tensor(0.0)
    agvm.optimizer.param_groups[0]["step"] = step
    agvm.load_state_dict(saved.state_dict())
    assert agvm.optimizer.param_groups[0]["step"] is step and step == 7
    assert agvm.optimizer.param_groups[0]["lr"] == 0.5


def test_infinite_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        AGVMConfig.model_validate({"ratio_bounds": [0.5, math.inf]})
