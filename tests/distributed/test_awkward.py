"""Models that change while they train, or that give a module its gradient in an unusual way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.engines import AGVM_BLOCK, backward, ds_config, heard, started, update
from tests.launch import run_ranks
from tests.models import Early, UsedTwice
from tests.toy import WIDTH, Toy

STAGES = (0, 1, 2, 3)
WAYS = [("SGD", "pairwise"), ("SGD", "split"), ("AdamW", "pairwise")]
Run = tuple[int, str, str]
RUNS: list[Run] = [(stage, *way) for stage in STAGES for way in WAYS]
EVERY = AGVM_BLOCK | {"interval": 1, "start_step": 0, "precondition": "auto"}


def config(run: Run, accumulation: int = 2, **block: Any) -> dict[str, Any]:
    stage, base, estimator = run
    return ds_config(stage, accumulation, base, EVERY | {"estimator": estimator} | block)


def no_longer_used(run: Run) -> Any:
    """A module that has gradients in updates 0 and 1 and none in 2 and 3."""
    with heard() as messages, started(config(run), Early()) as engine:
        for t in range(2):
            update(engine, t)
        before = engine.agvm.scale_factors["aux_head"], engine.agvm.variances["aux_head"]
        engine.module.early = False
        for t in range(2, 4):
            update(engine, t)
        after = engine.agvm.scale_factors["aux_head"], engine.agvm.variances["aux_head"]
        return before, after, [m for m in messages if "aux_head" in m], engine.agvm.variances["neck"]


def frozen_later(run: Run) -> Any:
    """The neck is frozen after the first update, and the frozen layer thawed."""
    with heard() as messages, started(config(run)) as engine:
        update(engine, 0)
        engine.module.neck.weight.requires_grad_(False)
        engine.module.frozen.weight.requires_grad_(True)
        mu = engine.agvm.scale_factors["neck"]
        for t in range(1, 4):
            update(engine, t)
        return messages, mu, engine.agvm.scale_factors["neck"], engine.agvm.variances


def used_twice(run: Run) -> str:
    """A module in two reentrant checkpoints of one forward."""
    with started(config(run), UsedTwice()) as engine:
        try:
            backward(engine, 0, 0)
        except RuntimeError as error:
            return str(error)
        return "nothing"


def left_early(run: Run) -> Any:
    """A step that the caller forces after one of two micro-batches: n is not what it was said to be."""
    with heard() as messages, started(config(run)) as engine:
        update(engine, 0)
        before = dict(engine.agvm.scale_factors)
        engine.set_gradient_accumulation_boundary(True)
        backward(engine, 1, 0)
        engine.step()
        engine.set_gradient_accumulation_boundary(None)
        return messages, before, dict(engine.agvm.scale_factors), engine.agvm.measured


BUCKET = 100
LARGEST = WIDTH**2
"""Elements of the toy's largest parameter, a bucket by itself."""


def memory(run: Run) -> tuple[int, int]:
    """The most elements that the estimator keeps while it reduces in a measured update, and what it keeps after it."""
    seen = [0]
    with started(config(run, interval=2, reduce_bucket_size=BUCKET), Early()) as engine:
        add_up = engine.agvm.shards.add_up

        def watched(values: torch.Tensor) -> torch.Tensor:
            seen.append(kept(engine))
            return add_up(values)

        engine.agvm.shards.add_up = watched
        update(engine, 0)
        return max(seen), kept(engine)


def kept(engine: Any) -> int:
    """Elements of the owner-reduction's tensors."""
    reduction = getattr(engine.agvm._estimator, "reduction", None)
    if reduction is None:
        return 0
    buckets = [bucket.values for bucket in reduction._buckets if bucket.values is not None]
    return sum(tensor.numel() for tensor in [*buckets, *reduction._owned])


CHECKS = [no_longer_used, frozen_later, left_early, memory]


def everything() -> dict[str, dict[Run, Any]]:
    """In a rank: all checks, one engine after another."""
    return {check.__name__: {run: check(run) for run in RUNS} for check in CHECKS}


def in_one_rank() -> dict[Run, str]:
    return {run: used_twice(run) for run in RUNS if run[0] < 2}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[Run, Any]]:
    """What rank 0 saw."""
    result: dict[str, dict[Run, Any]] = run_ranks(everything, 2, tmp_path_factory.mktemp("awkward"))[0]
    return result


every_run = pytest.mark.parametrize("run", RUNS, ids=str)


@every_run
def test_a_module_that_is_no_longer_used_keeps_its_scale_factor(run: Run, found: dict[str, Any]) -> None:
    """DeepSpeed's stage 3 then shows the module's last gradient as the average (4 x n microbatches long gone): a variance
    of 0, or worse, if it were believed.
    """
    before, after, messages, neck = found["no_longer_used"][run]
    assert 0 < before[1] < 2
    assert after[0] == before[0]
    assert math.isnan(after[1])
    assert 0 < neck < 2, "the others go on"
    assert messages == [
        "AGVM: update 2: module aux_head has no gradient to measure; its scale factor stays (said once)"
    ]


@every_run
def test_freezing_and_thawing_later_is_said_once(run: Run, found: dict[str, Any]) -> None:
    messages, before, after, variances = found["frozen_later"][run]
    assert len([m for m in messages if "parameters of neck were frozen after the start" in m]) == 1
    assert len([m for m in messages if "have been thawed" in m]) == 1
    assert after == before
    assert math.isnan(variances["neck"])
    assert 0 < variances["rpn_head"] < 2


@every_run
def test_an_update_of_other_than_n_micro_batches_is_not_measured(run: Run, found: dict[str, Any]) -> None:
    messages, before, after, measured = found["left_early"][run]
    assert after == before
    assert measured == 1
    assert "AGVM: update 1: 1 micro-batches instead of 2: not measured (said once)" in messages


@every_run
def test_what_is_kept_is_one_bucket_and_one_shard(run: Run, found: dict[str, Any]) -> None:
    """And nothing between measured updates. A shard is the half of the toy's parameters, but for padding and uneven parts; a
    second bucket is begun by ``temperature``, whose gradient comes early and which the model names first.
    """
    during, after = found["memory"][run]
    shard = sum(p.numel() for p in Toy().parameters() if p.requires_grad) / 2
    assert after == 0
    if run[1:] == ("SGD", "pairwise"):
        assert during == 0
    else:
        assert shard - LARGEST < during < shard + 2 * LARGEST


def test_a_module_in_two_reentrant_checkpoints_is_refused_when_it_happens(tmp_path: Any) -> None:
    for run, message in run_ranks(in_one_rank, 1, tmp_path)[0].items():
        assert "got two gradients in one micro-batch" in message, run
