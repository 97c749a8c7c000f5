"""A measured update with a bad gradient, in a user's own loop: DeepSpeed does what it does, and no scale factor changes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from tests.engines import AGVM_BLOCK, Record, backward, ds_config, heard, identical, record, started, train
from tests.launch import run_ranks

STAGES = (0, 1, 2, 3)
RANKS, ACCUMULATION = 2, 2
WAYS = [(base, estimator) for base in ("SGD", "AdamW") for estimator in ("pairwise", "split")]
BAD = {"nan": math.nan, "inf": math.inf, "huge": 1e25}
"""What one micro-batch's loss is multiplied by; of huge gradients the squares overflow fp32, and not float64."""
Run = tuple[int, str, str, str]
RUNS: list[Run] = [(stage, *way, bad) for stage in STAGES for way in WAYS for bad in BAD]


@dataclass
class Seen:
    """Around a bad measured update, and after the next one."""

    before: Record
    after: Record
    next: Record
    applied: bool
    messages: list[str]


def bad_update(run: Run) -> Seen:
    """In a rank: update 2 is bad, in its second micro-batch on rank 1."""
    stage, base, estimator, bad = run
    block = AGVM_BLOCK | {"interval": 1, "start_step": 0, "precondition": "auto", "estimator": estimator}
    with heard() as messages, started(ds_config(stage, ACCUMULATION, base, block)) as engine:
        before = train(engine, range(2))[-1]
        for k in range(ACCUMULATION):
            backward(engine, 2, k, scale=BAD[bad] if (engine.global_rank, k) == (1, 1) else 1.0)
            engine.step()
        after, applied = record(engine), engine.was_step_applied()
        return Seen(before, after, train(engine, range(3, 4))[-1], applied, list(messages))


def everything() -> dict[Run, Seen]:
    return {run: bad_update(run) for run in RUNS}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Run, Seen]]:
    found: list[dict[Run, Seen]] = run_ranks(everything, RANKS, tmp_path_factory.mktemp("bad"))
    return found


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_bad_update_changes_no_statistic(run: Run, runs: list[dict[Run, Seen]]) -> None:
    """Whether DeepSpeed steps (stage 0; stage 3 with huge gradients) or not."""
    for rank in range(RANKS):
        seen = runs[rank][run]
        for name in ("scale_factors", "variances", "noise_scales", "measured"):
            assert identical(getattr(seen.after, name), getattr(seen.before, name)), name
        assert seen.after.steps == 3
    assert sum("update 2: gradients, or their squares, are not finite" in m for m in runs[0][run].messages) == 1


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_the_next_measure_is_used_where_the_weights_are_whole(run: Run, runs: list[dict[Run, Seen]]) -> None:
    seen = runs[0][run]
    if not seen.applied:
        assert identical(seen.after.parameters, seen.before.parameters)
        assert seen.next.measured == seen.before.measured + 1
        assert not identical(seen.next.scale_factors, seen.after.scale_factors)
    assert all(math.sqrt(0.5) <= mu <= math.sqrt(10) for mu in seen.next.scale_factors.values())


def test_what_deepspeed_does_by_itself(runs: list[dict[Run, Seen]]) -> None:
    """In fp32; what agvm_ds.mmdet.detector.overflow says of it."""
    applied = {(stage, bad) for (stage, _, _, bad), seen in runs[0].items() if seen.applied}
    assert applied == {(0, "nan"), (0, "inf"), (0, "huge"), (3, "huge")}
