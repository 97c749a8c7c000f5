"""Loss scaling: DeepSpeed's own scalers on fp32 gradients, in ZeRO stages 1 to 3; and fp16 itself.

A scale that is a power of two changes no bit of a gradient but its exponent, so that a scaled run must be the unscaled run
bit for bit. fp16 is computed by a CPU where there is no GPU: DeepSpeed's own refusal of it there is switched off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from tests.comparison import FIGURE_FP16, FIGURE_FP16_ADAM, compare, expected_of
from tests.engines import AGVM_BLOCK, OPTIONS, Record, backward, ds_config, identical, record, started, train, update
from tests.launch import run_ranks
from tests.options import fp16_by_a_cpu
from tests.reference import Reference
from tests.toy import Toy, rounded

STAGES = (1, 2, 3)
RANKS, ACCUMULATION, UPDATES, SCALE = 2, 2, 5, 2.0**12
SPARE = 16
"""Updates, more than it takes from a loss scale of 2^24 to one that fits."""
WAYS = [("SGD", "pairwise"), ("SGD", "split"), ("AdamW", "pairwise"), ("AdamW", "split")]
Run = tuple[int, str, str]
RUNS: list[Run] = [(stage, *way) for stage in STAGES for way in WAYS]


def scaled(engine: Any, scaler: Any) -> Any:
    """The engine with a loss scaler of fp16 training."""
    engine.optimizer.loss_scaler = scaler
    engine.optimizer.check_grad_overflow = True
    engine.optimizer.dynamic_loss_scale = scaler.dynamic
    return engine


def config(run: Run) -> dict[str, Any]:
    stage, base, estimator = run
    block = AGVM_BLOCK | {"precondition": "auto", "estimator": estimator}
    return ds_config(stage, ACCUMULATION, base, block)


def dynamic() -> DynamicLossScaler:
    """Halves after a bad update. It is not let grow: DeepSpeed unscales the update in which it does by the new scale."""
    return DynamicLossScaler(SCALE, scale_window=1000, min_scale=1.0, delayed_shift=1, consecutive_hysteresis=False)


SCALERS: dict[str, Callable[[], Any]] = {"static": lambda: LossScaler(SCALE), "dynamic": dynamic}


@dataclass
class Skipped:
    """What is seen around a measured update that DeepSpeed skips."""

    before: Record
    after: Record
    scales: tuple[float, float]
    applied: bool
    next: Record


def infinite(engine: Any, t: int) -> None:
    """An update in which one micro-batch of one rank has infinite gradients."""
    for k in range(ACCUMULATION):
        backward(engine, t, k, scale=math.inf if (engine.global_rank, k) == (1, 0) else 1.0)
        engine.step()


def finite(engine: Any, t: int) -> None:
    """An update that DeepSpeed takes for an overflow (stage 3 in fp32: by its norm) although every statistic is finite."""
    engine.optimizer.has_overflow = lambda *args, **kwargs: True
    engine.optimizer._get_norm_groups = lambda: [torch.tensor(math.inf)]
    update(engine, t)
    del engine.optimizer.has_overflow, engine.optimizer._get_norm_groups


BAD: dict[str, Callable[[Any, int], None]] = {"infinite": infinite, "finite": finite}


def skipped(run: Run, bad: Callable[[Any, int], None]) -> Skipped:
    """In a rank: update 2 is measured and good, update 4 measured and skipped, update 6 measured and good."""
    with started(config(run)) as engine:
        scaled(engine, dynamic())
        before = train(engine, range(4))[-1]
        scale = engine.optimizer.loss_scale
        bad(engine, 4)
        after, applied, scales = record(engine), engine.was_step_applied(), (scale, engine.optimizer.loss_scale)
        return Skipped(before, after, scales, applied, train(engine, range(5, 7))[-1])


def from_too_large(run: Run) -> tuple[list[Record], list[Record], list[float]]:
    """fp16 from a loss scale that overflows: (what is seen after each skipped update, after each other, their scales)."""
    fp16 = {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}
    lost, taken, scales = [], [], []
    with fp16_by_a_cpu(), started(config(run) | {"fp16": fp16}, rounded(Toy())) as engine:
        for t in range(SPARE + UPDATES):
            update(engine, t)
            (taken if engine.was_step_applied() else lost).append(record(engine))
            scales.append(float(engine.optimizer.loss_scale))
    return lost, taken, scales


def everything() -> dict[str, Any]:
    """In a rank: all runs."""
    found: dict[str, Any] = {name: {} for name in ("plain", "fp16", *SCALERS, *BAD)}
    for run in RUNS:
        with started(config(run)) as engine:
            found["plain"][run] = train(engine, range(UPDATES))
        for kind, scaler in SCALERS.items():
            with started(config(run)) as engine:
                found[kind][run] = train(scaled(engine, scaler()), range(UPDATES))
        for kind, bad in BAD.items():
            found[kind][run] = skipped(run, bad)
        found["fp16"][run] = from_too_large(run)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = run_ranks(everything, RANKS, tmp_path_factory.mktemp("loss_scale"))[0]
    return found


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("kind", SCALERS)
def test_a_scaled_run_is_the_unscaled_run(kind: str, run: Run, runs: dict[str, Any]) -> None:
    for seen, right in zip(runs[kind][run], runs["plain"][run], strict=True):
        assert identical(seen, right)
    assert runs["plain"][run][-1].measured == 2


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("kind", BAD)
def test_an_update_that_is_skipped_changes_nothing_but_the_counter(kind: str, run: Run, runs: dict[str, Any]) -> None:
    seen: Skipped = runs[kind][run]
    assert not seen.applied
    assert seen.scales[1] == seen.scales[0] / 2, "DeepSpeed has noticed"
    for name in ("scale_factors", "variances", "noise_scales", "parameters", "measured"):
        assert identical(getattr(seen.after, name), getattr(seen.before, name)), name
    assert seen.after.steps == 5, "a skipped update counts"
    assert (seen.next.steps, seen.next.measured) == (7, seen.before.measured + 1)
    assert not identical(seen.next.scale_factors, seen.after.scale_factors), "the next measure is folded in"
    assert torch.isfinite(torch.tensor([v for n, v in seen.next.variances.items() if n != "aux_head"])).all()


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_fp16_that_begins_with_overflows_is_the_reference_from_there_on(run: Run, runs: dict[str, Any]) -> None:
    _, base, estimator = run
    lost, taken, scales = runs["fp16"][run]
    assert len(lost) >= 3, "it overflowed"
    assert scales[len(lost) - 1] == 2.0**24 / 2 ** len(lost) and len(taken) >= UPDATES
    for t, seen in enumerate(lost):
        assert seen.steps == t + 1 and seen.measured == 0
        assert set(seen.scale_factors.values()) == {1.0}
        assert identical(seen.parameters, lost[0].parameters)
    reference = Reference(
        RANKS,
        ACCUMULATION,
        estimator=estimator,
        preconditioned=base == "AdamW",
        base=getattr(torch.optim, base),
        options=dict(OPTIONS[base]),
        model=rounded(Toy()),
    )
    right = expected_of(reference, len(taken), first=len(lost))
    found = compare(taken, right)
    print(f"{run}: {len(lost)} skipped, then {found}")
    assert found.within(FIGURE_FP16_ADAM if base == "AdamW" else FIGURE_FP16)
