"""What docs/options.md says of DeepSpeed itself, without AGVM: a test that fails when a release mends it.

Then the note, and what is done about it here (a refusal, a message), can go.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from tests.engines import ds_config, parameters, update
from tests.launch import RankFailure, run_ranks
from tests.models import Early, Sometimes
from tests.options import fp16_by_a_cpu
from tests.toy import Toy

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
RATE = 0.05


def plain(model: Toy, stage: int, fp16: Any = None, clipping: float | None = 0.0, **zero: Any) -> Any:
    """An engine without AGVM: SGD without momentum or decay."""
    config = ds_config(stage, 2, agvm=None, zero_allow_untested_optimizer=True, gradient_clipping=clipping)
    config |= {"fp16": fp16} if fp16 else {}
    if clipping is None:
        del config["gradient_clipping"]
    config["optimizer"]["params"] = {"lr": RATE}
    config["zero_optimization"] |= zero
    trained = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]


def moved(stage: int, **zero: Any) -> float:
    """How far a module goes in an update in which it has no gradient, after one in which it had."""
    engine = plain(Early(), stage, **zero)
    update(engine, 0)
    engine.module.early = False
    before = parameters(engine)["aux_head.weight"]
    update(engine, 1)
    distance = float((parameters(engine)["aux_head.weight"] - before).abs().max())
    engine.destroy()
    return distance


def looked_up(round_robin: bool) -> float:
    """How far what DeepSpeed finds as a parameter's fp32 value is from the parameter."""
    engine = plain(Toy(), 2, round_robin_gradients=round_robin)
    found = {
        name: deepspeed.utils.safe_get_full_fp32_param(p)
        for name, p in engine.module.named_parameters()
        if p.requires_grad
    }
    far = max(float((found[name] - p).abs().max()) for name, p in engine.module.named_parameters() if name in found)
    engine.destroy()
    return far


def grown(window: int) -> float:
    """How far a parameter goes in three updates with a loss scale that doubles every ``window`` updates."""
    engine = plain(Toy(), 2)
    engine.optimizer.loss_scaler = DynamicLossScaler(2.0**12, window, 1.0, 1, False)
    for t in range(3):
        update(engine, t)
    distance = float((parameters(engine)["temperature"] - 1).abs().max())
    engine.destroy()
    return distance


def with_fp16(stage: int) -> float:
    """How far a parameter goes in an update with fp16 weights, computed by a CPU."""
    with fp16_by_a_cpu(True):
        engine = plain(Toy(), stage, fp16={"enabled": True, "initial_scale_power": 8})
        before = parameters(engine)["backbone.0.weight"]
        update(engine, 0)
        distance = float((parameters(engine)["backbone.0.weight"] - before).abs().max())
        engine.destroy()
    return distance


def by_default(stage: int) -> tuple[float, float]:
    """How far the parameters go in an update of a large gradient: without a word about clipping, and clipped to norm 1."""
    found = []
    for clipping in (None, 1.0):
        engine = plain(Toy(), stage, clipping=clipping)
        before = parameters(engine)
        update(engine, 0, scale=1e3)
        moved = [(value - before[name]).square().sum() for name, value in parameters(engine).items()]
        found.append(float(torch.stack(moved).sum().sqrt()))
        engine.destroy()
    return found[0], found[1]


def everything() -> dict[str, Any]:
    """In a rank: the figures of all notes."""
    return {
        "no gradient": {(stage, bool(zero)): moved(stage, **zero) for stage in (1, 2, 3) for zero in ({}, OFFLOAD)},
        "looked up": (looked_up(False), looked_up(True)),
        "grown": (grown(1000), grown(1)),
        "fp16": (with_fp16(0), with_fp16(1)),
        "clipping": [by_default(stage) for stage in range(4)],
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    result: dict[str, Any] = run_ranks(everything, 2, tmp_path_factory.mktemp("deepspeed"))[0]
    return result


def test_stage_3_and_offload_step_a_gradient_that_is_not_there(found: dict[str, Any]) -> None:
    steps = {key for key, distance in found["no gradient"].items() if distance > 0}
    assert steps == {(1, True), (2, True), (3, False), (3, True)}


def test_round_robin_gradients_finds_others_elements(found: dict[str, Any]) -> None:
    right, wrong = found["looked up"]
    assert right == 0
    assert wrong > 0.1


def test_a_growing_loss_scale_makes_its_update_smaller(found: dict[str, Any]) -> None:
    steady, growing = found["grown"]
    assert growing < 0.8 * steady


def test_it_clips_to_norm_1_unless_told_otherwise(found: dict[str, Any]) -> None:
    for default, clipped in found["clipping"]:
        assert default == clipped == pytest.approx(RATE, rel=1e-3)


def some_ranks_only(stage: int) -> None:
    engine = plain(Sometimes(), stage)
    for t in range(6):
        update(engine, t)


def test_stage_2_does_not_survive_a_gradient_on_some_ranks_only(tmp_path: Path) -> None:
    run_ranks(some_ranks_only, 2, tmp_path, 1)
    with pytest.raises(RankFailure):
        run_ranks(some_ranks_only, 2, tmp_path, 2, timeout=60)


def test_fp16_in_stage_0_trains_nothing(found: dict[str, Any]) -> None:
    """DeepSpeed scales the loss for its ZeRO optimizers alone, and divides by the scale all the same."""
    without, with_zero = found["fp16"]
    assert without == 0.0 and with_zero > 1e-4
