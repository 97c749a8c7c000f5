"""What AGVM must not do in silence: start where it cannot measure, read a shard that is not there, fold in bad numbers."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

import agvm_ds
from agvm_ds.config import ConfigError
from agvm_ds.shards import ShardError
from tests.engines import AGVM_BLOCK, backward, ds_config, started, update
from tests.launch import run_ranks
from tests.toy import Toy

STAGES = (0, 1, 2, 3)

STARTS: dict[str, tuple[dict[str, Any], str]] = {
    "one micro-batch": (ds_config(2, 1), "n = 1 micro-batch"),
    "unknown anchor": (ds_config(2, 2, agvm=AGVM_BLOCK | {"anchor": "bakbone"}), "no module of that name"),
    "frozen anchor": (ds_config(2, 2, agvm=AGVM_BLOCK | {"anchor": "frozen"}), "all its parameters are frozen"),
    "unknown module": (ds_config(2, 2, agvm=AGVM_BLOCK | {"modules": ["nek"]}), "did you mean neck"),
    "autocast to fp16 in stage 2": (
        ds_config(2, 2, torch_autocast={"enabled": True, "dtype": "half"}),
        "torch_autocast.dtype = 'half' in ZeRO stage 2",
    ),
    "autocast to what torch chooses": (
        ds_config(0, 2, torch_autocast={"enabled": True}),
        "torch_autocast.dtype: is missing",
    ),
    "fp16 in stage 0": (ds_config(0, 2, fp16={"enabled": True}), "fp16.enabled in ZeRO stage 0"),
    "summed": (ds_config(1, 2, gradient_allreduce_op="sum"), "no mean of the micro-gradients"),
    "unmanaged": (ds_config(2, 2, managed_gradient_accumulation=False), "managed_gradient_accumulation"),
}


def said(config: dict[str, Any]) -> str:
    """What ``initialize`` raises."""
    try:
        with started(config):
            return "nothing"
    except ConfigError as error:
        return str(error)


def poisoned(stage: int) -> tuple[Any, ...]:
    """Counters before and after a measured update in which one micro-batch has infinite gradients."""
    with started(ds_config(stage, 2)) as engine:
        for t in range(3):
            update(engine, t)
        before = dict(engine.agvm.scale_factors), dict(engine.agvm.variances), engine.agvm.measured
        update(engine, 3)
        backward(engine, 4, 0)
        engine.step()
        backward(engine, 4, 1, scale=math.inf)
        engine.step()
        after = dict(engine.agvm.scale_factors), dict(engine.agvm.variances), engine.agvm.measured
        return before, after, engine.agvm.steps


def lost_shard(stage: int) -> str:
    """What a measure says when a gradient is not where it should be."""
    with started(ds_config(stage, 2)) as engine:
        for t in range(2):
            update(engine, t)
        backward(engine, 2, 0)
        engine.step()
        backward(engine, 2, 1)
        if stage == 0:
            engine.module.neck.weight.grad = None
        else:
            engine.optimizer.averaged_gradients[0] = None if stage == 1 else [torch.zeros(1)]
        try:
            engine.step()
        except ShardError as error:
            return str(error)
        return "nothing"


def twice() -> str:
    """What a second backward in one micro-batch of a measured update says."""
    with started(ds_config(1, 2, agvm=AGVM_BLOCK | {"start_step": 0})) as engine:
        backward(engine, 0, 0)
        try:
            backward(engine, 0, 0)
        except RuntimeError as error:
            return str(error)
        return "nothing"


def sparse() -> str:
    """What an embedding with sparse gradients says."""
    toy = Toy()
    toy.neck.table = torch.nn.Embedding(3, 2, sparse=True)
    try:
        with started(ds_config(0, 2), toy):
            return "nothing"
    except ConfigError as error:
        return str(error)


def late(place: Path) -> str:
    """What attach says once a checkpoint has been loaded."""
    groups = lambda net: agvm_ds.param_groups(net, lr=0.1)  # noqa: E731
    config = {key: value for key, value in ds_config(1, 2).items() if key != "optimizer"}
    config["zero_allow_untested_optimizer"] = True
    with started(ds_config(1, 2)) as engine:
        update(engine, 0)
        engine.save_checkpoint(str(place))
    toy = Toy()
    engine, *_ = deepspeed.initialize(model=toy, optimizer=agvm_ds.AGVM(groups(toy), lr=0.1), config=config)
    engine.load_checkpoint(str(place))
    try:
        agvm_ds.attach(engine)
    except ConfigError as error:
        return str(error)
    finally:
        engine.destroy()
    return "nothing"


def divided(factor: float) -> str:
    """In two ranks: what a predivide factor says that DeepSpeed does not multiply back."""
    zero = {"stage": 3, "reduce_scatter": False}
    config = ds_config(3, 2, gradient_predivide_factor=factor, zero_optimization=zero)
    return said(config)


def off(**blocks: Any) -> list[str]:
    """What is logged of an AGVM optimizer under a config without AGVM's block, or with ``blocks``."""
    kept: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: kept.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("agvm_ds").addHandler(handler)
    toy = Toy()
    optimizer = agvm_ds.AGVM(agvm_ds.param_groups(toy, modules=["backbone", "neck"]), base=torch.optim.SGD, lr=0.1)
    config = {key: value for key, value in ds_config(2, 2).items() if key not in ("agvm", "optimizer")}
    engine, *_ = agvm_ds.initialize(model=toy, optimizer=optimizer, config={**config, **blocks})
    logging.getLogger("agvm_ds").removeHandler(handler)
    assert engine.agvm is None
    engine.destroy()
    return kept


def everything(place: Path) -> dict[str, Any]:
    """In one rank: all checks, one engine after another."""
    return {
        "sparse": sparse(),
        "late": late(place),
        "starts": {name: said(config) for name, (config, _) in STARTS.items()},
        "poisoned": {stage: poisoned(stage) for stage in STAGES},
        "lost": {stage: lost_shard(stage) for stage in STAGES},
        "twice": twice(),
        "off": (off(), off(agvm={"enabled": False})),
    }


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = Path(tmp_path_factory.mktemp("ranks"))
    result: dict[str, Any] = run_ranks(everything, 1, place, place / "checkpoint")[0]
    return result


@pytest.mark.parametrize("name", STARTS)
def test_what_cannot_be_measured_is_refused_at_start(name: str, outcome: dict[str, Any]) -> None:
    assert STARTS[name][1] in outcome["starts"][name]


@pytest.mark.parametrize("stage", STAGES)
def test_numbers_gone_bad_change_no_scale_factor(stage: int, outcome: dict[str, Any]) -> None:
    before, after, steps = outcome["poisoned"][stage]
    assert before[0] != dict.fromkeys(before[0], 1.0)
    assert repr(after) == repr(before)  # repr: nan equals nan
    assert steps == 5


@pytest.mark.parametrize("stage", STAGES)
def test_a_shard_that_is_not_there_is_an_error_never_a_zero(stage: int, outcome: dict[str, Any]) -> None:
    assert any(
        words in outcome["lost"][stage] for words in ("no averaged gradient", "is missing", "elements, expected")
    )


def test_two_gradients_in_one_micro_batch_are_refused(outcome: dict[str, Any]) -> None:
    assert "got two gradients in one micro-batch" in outcome["twice"]


def test_an_agvm_optimizer_without_its_block_is_told(outcome: dict[str, Any]) -> None:
    silent, meant = outcome["off"]
    assert [text for text in silent if "AGVM is off: the DeepSpeed config has no agvm block" in text] and not meant


def test_the_toy_has_a_frozen_module() -> None:
    assert not any(parameter.requires_grad for parameter in Toy().frozen.parameters())


def test_sparse_gradients_are_refused_by_what_makes_them(outcome: dict[str, Any]) -> None:
    assert "an embedding with sparse=True: not supported with AGVM" in outcome["sparse"]


def test_attach_comes_before_load_checkpoint(outcome: dict[str, Any]) -> None:
    """Once, the scale factors of the checkpoint were lost without a word."""
    assert "the engine is at update 1 already: attach before load_checkpoint" in outcome["late"]


def test_a_factor_that_deepspeed_does_not_multiply_back_is_refused(tmp_path: Path) -> None:
    assert "gradient_predivide_factor = 2.0 in stage 3" in run_ranks(divided, 2, tmp_path, 2.0)[0]
    assert run_ranks(divided, 2, tmp_path, 4.0)[0] == "nothing"
