"""Every ZeRO stage against the dense reference, at every update: scale factors, variances, noise scales, parameters.

The reference (tests/reference.py) knows no ranks: it sees the n micro-batches of an update, in float64. Each case prints
its worst differences (``pytest -rP`` shows them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupLR

from tests.comparison import FIGURE, FIGURE_BF16, Expected, Worst, compare, expected_of
from tests.engines import OPTIONS, ROWS, Record, ds_config, identical, started, train
from tests.launch import run_ranks
from tests.reference import Reference
from tests.toy import Toy, rounded

UPDATES = 8
GRIDS = [(1, 4), (2, 1), (2, 2), (3, 1), (4, 1), (2, 3)]
"""(ranks, accumulation)"""
STAGES = range(4)
BASES = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}
WARMUP = {"warmup_min_lr": 0.01, "warmup_max_lr": 0.05, "warmup_num_steps": 5}


@dataclass(frozen=True)
class Case:
    """One training run."""

    ranks: int
    accumulation: int
    stage: int
    base: str = "SGD"
    bf16: bool = False
    start: int = 1
    stop: int | None = None
    interval: int = 2
    max_norm: float = 0.0
    clip_window: tuple[int, int] | None = None
    warmup: bool = False
    estimator: str = "pairwise"
    precondition: str = "none"
    bucket: int = 500_000_000
    anchor: str = "backbone"
    eps: float = 1e-6
    bounds: tuple[float, float] = (0.5, 10.0)

    def __str__(self) -> str:
        shown = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        rest = [
            f"{key}={value}" for key, value in shown.items() if key not in ("ranks", "accumulation", "stage", "base")
        ]
        return " ".join([f"{self.ranks}x{self.accumulation} stage{self.stage} {self.base}", *rest])

    def config(self) -> dict[str, Any]:
        """Its DeepSpeed configuration."""
        block = {"interval": self.interval, "start_step": self.start, "stop_step": self.stop, "ema_decay": 0.9}
        block |= {"precondition": self.precondition, "clip_window": self.clip_window}
        block |= {"estimator": self.estimator, "reduce_bucket_size": self.bucket}
        block |= {"anchor": self.anchor, "eps": self.eps, "ratio_bounds": list(self.bounds)}
        more: dict[str, Any] = {"gradient_clipping": self.max_norm}
        more |= {"bf16": {"enabled": True}} if self.bf16 else {}
        more |= {"scheduler": {"type": "WarmupLR", "params": WARMUP}} if self.warmup else {}
        config = ds_config(self.stage, self.accumulation, self.base, block, **more)
        config["optimizer"]["params"] |= self.options()
        return config

    def options(self) -> dict[str, Any]:
        """The base's arguments; no weight decay in bf16, see ``test_bf16_agrees_as_far_as_bf16_goes``."""
        return OPTIONS[self.base] | ({"weight_decay": 0.0} if self.bf16 else {})


FP32 = [Case(ranks, gas, stage, base) for ranks, gas in GRIDS for base in BASES for stage in STAGES]
SPLIT = [Case(ranks, gas, stage, estimator="split") for ranks, gas in GRIDS for stage in STAGES]
PRECONDITIONED = [
    Case(ranks, gas, stage, "AdamW", start=0, interval=interval, estimator=estimator, precondition="auto")
    for ranks, gas in GRIDS
    for estimator, interval in (("pairwise", 1), ("split", 2))
    for stage in STAGES
]
BUCKETS = [
    Case(ranks, gas, stage, base, estimator=estimator, precondition="auto", bucket=bucket)
    for ranks, gas in ((1, 4), (2, 3), (3, 1))
    for base, estimator in (("SGD", "split"), ("AdamW", "pairwise"))
    for stage in STAGES
    for bucket in (1, 100)
]
"""A bucket for each parameter, and several parameters in most (the largest has 144 elements)."""
CLIPPED = [Case(2, 2, stage, max_norm=0.1, clip_window=window) for stage in STAGES for window in (None, (2, 4))]
EDGES = [
    Case(2, 1, 0, start=2, stop=4),
    Case(2, 1, 1, start=3, stop=5),
    Case(2, 1, 2, start=4, stop=4),
    Case(2, 1, 3, start=0, stop=0),
    Case(2, 1, 2, start=5, stop=5),
    Case(2, 1, 3, start=0, interval=1),
    Case(2, 1, 1, start=UPDATES),
]
RATIO = [
    Case(2, 2, stage, estimator=estimator, **key)
    for stage in (0, 3)
    for estimator in ("pairwise", "split")
    for key in ({"anchor": "neck"}, {"eps": 0.1}, {"bounds": (0.9, 1.1)})
]
SCHEDULED = [Case(2, 1, stage, warmup=True) for stage in STAGES]
BF16 = [
    Case(ranks, gas, stage, bf16=True, estimator=estimator)
    for ranks, gas in ((2, 2), (3, 1))
    for estimator in ("pairwise", "split")
    for stage in STAGES
]
CASES = [*FP32, *SPLIT, *PRECONDITIONED, *BUCKETS, *CLIPPED, *EDGES, *RATIO, *SCHEDULED, *BF16]

Runs = Callable[[Case], list[Record]]


def train_cases(cases: list[Case]) -> list[list[Record]]:
    """In a rank: one engine after another, each trained from the start."""
    runs = []
    for case in cases:
        with started(case.config(), rounded(Toy()) if case.bf16 else Toy()) as engine:
            runs.append(train(engine, range(UPDATES)))
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """case -> rank 0's records. Ranks are started once a world size; all ranks must have seen the same."""

    @cache
    def of(ranks: int) -> dict[Case, list[Record]]:
        cases = [case for case in CASES if case.ranks == ranks]
        by_rank = run_ranks(train_cases, ranks, tmp_path_factory.mktemp("reference"), cases)
        for other in by_rank[1:]:
            assert identical(other, by_rank[0]), "the ranks disagree"
        return dict(zip(cases, by_rank[0], strict=True))

    return lambda case: of(case.ranks)[case]


@cache
def expected(case: Case) -> list[Expected]:
    """The reference's run of a case, with n micro-batches an update."""
    reference = Reference(
        ranks=case.ranks,
        accumulation=case.accumulation,
        rows=ROWS,
        estimator=case.estimator,
        preconditioned=case.precondition == "auto" and case.base == "AdamW",
        interval=case.interval,
        start=case.start,
        stop=case.stop,
        max_norm=case.max_norm,
        clip_window=case.clip_window,
        anchor=case.anchor,
        eps=case.eps,
        bounds=case.bounds,
        base=BASES[case.base],
        options=case.options(),
    )
    if case.bf16:
        rounded(reference.model)
    return expected_of(reference, UPDATES, warmup_rates() if case.warmup else ())


@cache
def warmup_rates() -> list[float]:
    """The rate of each update, and of the one after the last, under DeepSpeed's own scheduler on a plain optimizer."""
    plain = torch.optim.SGD([torch.zeros(1)], lr=OPTIONS["SGD"]["lr"])
    scheduler, rates = WarmupLR(plain, **WARMUP), []
    for _ in range(UPDATES + 1):
        rates.append(plain.param_groups[0]["lr"])
        scheduler.step()
    return rates


def check(case: Case, records: list[Record], allowed: Worst) -> None:
    found = compare(records, expected(case))
    print(f"{case}: {found}")
    assert found.within(allowed), f"{case}: {found}"


@pytest.mark.parametrize("case", [*FP32, *SPLIT], ids=str)
def test_every_update_agrees_with_the_reference(case: Case, runs: Runs) -> None:
    check(case, runs(case), FIGURE)


@pytest.mark.parametrize("case", [*PRECONDITIONED, *BUCKETS], ids=str)
def test_the_gradient_as_an_adam_sees_it(case: Case, runs: Runs) -> None:
    """From the first update on. In the second one a few elements' v is still near 0, and 1 / (sqrt(v) + eps) magnifies the
    rounding of their fp32 gradients: the reference itself, run in fp32, is then off by 1.0e-5 in a variance of one case.
    """
    check(case, runs(case), Worst(1e-5, 2e-5, 1e-5, 1e-5))


@pytest.mark.parametrize("case", CLIPPED, ids=str)
def test_clipping_limits_the_step_and_not_the_statistics(case: Case, runs: Runs) -> None:
    check(case, runs(case), FIGURE)


@pytest.mark.parametrize("case", EDGES, ids=str)
def test_start_and_stop_are_the_first_and_last_modulated_updates(case: Case, runs: Runs) -> None:
    check(case, runs(case), FIGURE)


@pytest.mark.parametrize("case", RATIO, ids=str)
def test_anchor_eps_and_bounds_are_those_of_the_block(case: Case, runs: Runs) -> None:
    check(case, runs(case), FIGURE)
    usual = Case(case.ranks, case.accumulation, case.stage, estimator=case.estimator)
    assert compare(runs(case), expected(usual)).scale_factors > 1e-3, "it makes a difference"


@pytest.mark.parametrize("case", SCHEDULED, ids=str)
def test_a_scheduler_of_the_json_acts_as_without_agvm(case: Case, runs: Runs) -> None:
    check(case, runs(case), FIGURE)
    for seen, rate in zip(runs(case), warmup_rates()[1:], strict=True):
        assert set(seen.rates.values()) == {rate}, "a modulated rate is shown"


@pytest.mark.parametrize("case", BF16, ids=str)
def test_bf16_agrees_as_far_as_bf16_goes(case: Case, runs: Runs) -> None:
    """Without weight decay: DeepSpeed's stage 0 bf16 optimizer decays the weights once when it creates its state, with AGVM
    or without.
    """
    check(case, runs(case), FIGURE_BF16)
