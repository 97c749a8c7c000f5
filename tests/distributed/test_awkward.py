"""Models that change while they train, or that give a module its gradient in an unusual way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import agvm_ds
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


def a_part(run: Run) -> tuple[list[str], float]:
    """The caller trains a part of what could be trained: nothing of that has been thawed."""
    model = Toy()
    part = [*model.backbone.parameters(), *model.neck.parameters()]
    with (
        heard() as messages,
        started(config(run, modules=["backbone", "neck"]), model, model_parameters=part) as engine,
    ):
        for t in range(2):
            update(engine, t)
        return messages, engine.agvm.variances["neck"]


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


def still(run: Run, **more: Any) -> dict[str, Any]:
    """A configuration with which nothing moves; an Adam then sees, to some digits, the gradient itself."""
    settings = config(run, **more)
    settings["optimizer"]["params"] |= {"lr": 0.0}
    if run[1] == "AdamW":
        settings["optimizer"]["params"] |= {"betas": [0.9, 1 - 1e-12], "eps": 1.0}
    return settings


PAIR = {"backbone": ["backbone"], "pair": ["neck", "aux_head"]}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}


def in_turn(run: Run) -> tuple[list[float], list[float]]:
    """The variances of a module of which a part has gradients in every second update, and those of its other part."""
    settings = [still(run, modules=PAIR), still(run)]
    if run[0]:
        settings.append(still(run, modules=PAIR) | {"zero_optimization": OFFLOADED | {"stage": run[0]}})
    found: dict[str, list[float]] = {"pair": [], "neck": []}
    for one in settings:
        with started(one, Early()) as engine:
            for t in range(4):
                engine.module.early = t % 2 == 0
                update(engine, t)
                name = "pair" if "pair" in engine.agvm.variances else "neck"
                found[name].append(engine.agvm.variances[name])
    return found["pair"], found["neck"]


def uneven(run: Run) -> Any:
    """Rank 1 leaves out a backward, as a loop does for a batch without objects; from stage 2 on DeepSpeed cannot go on."""
    if run[0] > 1:
        return None
    with heard() as messages, started(config(run)) as engine:
        for t in range(3):
            for k in range(2):
                if (t, k, engine.global_rank) != (1, 0, 1):
                    backward(engine, t, k)
                engine.step()
        return messages, engine.agvm.measured, engine.agvm.variances


def after_a_short_update(run: Run) -> tuple[dict[str, float], dict[str, float]]:
    """The variances of an update before and after one that the caller has cut short; nothing moves."""
    with started(still(run, accumulation=4)) as engine:
        update(engine, 0)
        before = dict(engine.agvm.variances)
        engine.set_gradient_accumulation_boundary(True)
        backward(engine, 1, 0)
        engine.step()
        for t in (0, 0):
            for k in range(4):
                engine.set_gradient_accumulation_boundary(k == 3)
                backward(engine, t, k)
                engine.step()
        assert engine.agvm.measured == 3
        return before, dict(engine.agvm.variances)


def broken_off(run: Run) -> Any:
    """A backward that fails in the middle, is caught, and taken again."""
    with heard() as messages, started(config(run, accumulation=4)) as engine:
        fails = [True]

        def fail(gradient: torch.Tensor) -> None:
            if fails.pop():
                raise MemoryError("no room")

        for t in range(2):
            for k in range(4):
                if (t, k) == (0, 1):
                    hook = engine.module.backbone[0].weight.register_hook(fail)
                    with pytest.raises(MemoryError):
                        backward(engine, t, k)
                    hook.remove()
                backward(engine, t, k)
                engine.step()
        return messages, engine.agvm.measured


def one_after_another(run: Run) -> tuple[int, int, list[str]]:
    """Engines on one model, with AGVM, without, and with it again: none feels the one before."""
    model, counts = Toy(), []
    for block in (EVERY, None, EVERY):
        settings = ds_config(run[0], 2, run[1], None if block is None else block | {"estimator": run[2]})
        with started(settings, model) as engine:
            update(engine, 0)
            counts.append(engine.agvm and engine.agvm.measured)
    left = [name for name, parameter in model.named_parameters() if parameter._backward_hooks]
    return counts[0], counts[2], left


def given_otherwise(run: Run) -> dict[str, float]:
    """A module that is frozen after the groups were made, and a parameter without elements."""
    model = Toy()
    model.neck.register_parameter("empty", torch.nn.Parameter(torch.zeros(0)))
    groups = agvm_ds.param_groups(model)
    optimizer = agvm_ds.AGVM(groups, base=torch.optim.SGD, lr=0.1)
    model.rpn_head[0].weight.requires_grad_(False)
    with started(config(run), model, optimizer=optimizer) as engine:
        update(engine, 0)
        return dict(engine.agvm.variances)


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


CHECKS = [no_longer_used, frozen_later, a_part, left_early, memory, in_turn, uneven]
ALONE = [used_twice, after_a_short_update, broken_off]
"""In one rank; a model that fails, or is cut short, in ZeRO stages that go on by themselves."""
OF_SGD = [one_after_another, given_otherwise]
RUNS_ALONE = [run for run in RUNS if run[0] < 2]
RUNS_OF_SGD = [run for run in RUNS_ALONE if run[1] == "SGD"]


def everything() -> dict[str, dict[Run, Any]]:
    """In a rank: all checks, one engine after another."""
    return {check.__name__: {run: check(run) for run in RUNS} for check in CHECKS}


def in_one_rank() -> dict[str, dict[Run, Any]]:
    found = {check.__name__: {run: check(run) for run in RUNS_ALONE} for check in ALONE}
    return found | {check.__name__: {run: check(run) for run in RUNS_OF_SGD} for check in OF_SGD}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[Run, Any]]:
    result: dict[str, dict[Run, Any]] = run_ranks(in_one_rank, 1, tmp_path_factory.mktemp("alone"))[0]
    return result


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
def test_what_the_caller_leaves_untrained_was_not_thawed(run: Run, found: dict[str, Any]) -> None:
    messages, variance = found["a_part"][run]
    assert [m for m in messages if "thawed" in m] == [] and 0 < variance < 2


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
    said = "not measured: 2 of 2 ranks have not seen all of it (1 micro-batches of 2 on rank 0) (said once)"
    assert f"AGVM: update 1: {said}" in messages


@every_run
def test_a_part_without_gradient_counts_as_zero_in_every_stage(run: Run, found: dict[str, Any]) -> None:
    """In stage 3, and with ZeRO-Offload, DeepSpeed shows its last gradient again; stage 0 and the others show zero.

    Every second update the module's variance is that of the part that has a gradient.
    """
    pair, neck = found["in_turn"][run]
    expected = found["in_turn"][(0, "SGD", run[2])][0]
    assert all(0 < value < 2 for value in expected)
    assert len(pair) == (8 if run[0] else 4)
    assert pair == pytest.approx(expected * (len(pair) // 4), rel=1e-5)
    assert expected[1::2] == pytest.approx(neck[1::2], rel=1e-5)
    assert abs(expected[0] - neck[0]) > 1e-3, "both have one in the others"


@pytest.mark.parametrize("run", [run for run in RUNS if run[0] < 2], ids=str)
def test_ranks_with_another_number_of_backwards_agree_not_to_measure(run: Run, found: dict[str, Any]) -> None:
    messages, measured, variances = found["uneven"][run]
    said = "not measured: 1 of 2 ranks have not seen all of it (2 micro-batches of 2 on rank 0) (said once)"
    assert f"AGVM: update 1: {said}" in messages
    assert measured == 2 and 0 < variances["neck"] < 2


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


in_one = pytest.mark.parametrize("run", RUNS_ALONE, ids=str)
of_sgd = pytest.mark.parametrize("run", RUNS_OF_SGD, ids=str)


@in_one
def test_a_module_in_two_reentrant_checkpoints_is_refused_when_it_happens(run: Run, alone: dict[str, Any]) -> None:
    assert "got two gradients in one micro-batch" in alone["used_twice"][run]


@in_one
def test_updates_after_a_short_one_are_measured_as_before(run: Run, alone: dict[str, Any]) -> None:
    before, after = alone["after_a_short_update"][run]
    assert 0 < before["backbone"] < 2
    assert after == pytest.approx(before, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("run", [run for run in RUNS if run[0] == 0], ids=str)
def test_a_backward_that_failed_leaves_its_update_unmeasured(run: Run, alone: dict[str, Any]) -> None:
    messages, measured = alone["broken_off"][run]
    assert len([m for m in messages if "update 0: not measured: 1 of 1 ranks" in m]) == 1
    assert measured == 1


@of_sgd
def test_an_engine_does_not_feel_the_one_before_on_its_model(run: Run, alone: dict[str, Any]) -> None:
    assert alone["one_after_another"][run] == (1, 1, []), "measures, and parameters with hooks"


@of_sgd
def test_what_deepspeed_leaves_out_is_not_measured(run: Run, alone: dict[str, Any]) -> None:
    variances = alone["given_otherwise"][run]
    assert 0 < variances["neck"] < 2 and 0 < variances["rpn_head"] < 2
