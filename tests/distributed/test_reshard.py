"""A checkpoint goes on in a run of another layout: ranks, ZeRO stage, modules; nothing of weights and moments is lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from agvm_ds.checkpoints import Placed, Vault, WholeState, layout_of, load_into
from agvm_ds.mmdet.detector.weights import gather_weights
from tests.engines import identical, masters, update
from tests.launch import run_ranks
from tests.layouts import MODULES, Run

SAVED, ALL = 3, 6
"""Updates before the checkpoint, and altogether."""


SOURCES = [
    *(Run(2, stage, base) for stage in range(4) for base in ("SGD", "AdamW")),
    *(Run(2, stage, "AdamW", bf16=True) for stage in range(4)),
    *(Run(2, stage, "FusedAdam", bf16=bf16) for stage in (0, 1) for bf16 in (False, True)),
    Run(2, 1, "AdamW", bf16=True, extra="fp32 accumulation"),
    Run(2, 2, "AdamW", extra="round robin"),
    Run(2, 1, "AdamW", extra="aligned"),
    Run(2, 3, "AdamW", extra="sub-groups"),
    Run(2, 3, "AdamW", extra="offload"),
    Run(2, 2, "SGD", extra="offload"),
]


def targets(source: Run, ranks: int) -> list[Run]:
    """Other layouts with this many ranks that a checkpoint of ``source`` is loaded into."""
    stage = (source.stage + ranks) % 4  # with 1 and 3 ranks: each to each but two apart
    if source.extra:  # with it and without, in the same stage
        return [replace(source, ranks=ranks), replace(source, ranks=ranks, extra="")]
    moved = [replace(source, ranks=ranks, stage=stage)]
    if ranks == 3:
        moved.append(replace(source, ranks=ranks, stage=(source.stage + 2) % 4, modules=tuple(MODULES[:2])))
        moved.append(replace(source, ranks=ranks, agvm=False))
        moved.append(replace(source, ranks=ranks, stage=source.stage, bf16=not source.bf16))
    return moved


def settle(engine: Any) -> None:
    """Each group goes on with a rate and a decay of its own."""
    for index, group in enumerate(engine.basic_optimizer.param_groups):
        group["lr"] *= 1 + index / 10
        group["weight_decay"] *= 1 + index / 5


def settings(engine: Any) -> list[tuple[float, float]]:
    return [(group["lr"], group["weight_decay"]) for group in engine.basic_optimizer.param_groups]


def save(engine: Any, placed: Placed, place: Path, run: Run) -> None:
    Vault(place).save(engine, str(run), {"agvm": engine.agvm and engine.agvm.state_dict()}, layout_of(engine, placed))


def whole(place: Path, run: Run) -> WholeState:
    manifest = Vault(place).manifest(str(run))
    assert manifest is not None
    return WholeState(place / str(run), manifest.layout)


def sources(place: Path) -> dict[Run, Any]:
    """In a rank: train, save, and look with DeepSpeed's own eyes at what there is; then train on."""
    found = {}
    for run in SOURCES:
        with run.start() as (engine, placed):
            for t in range(SAVED):
                update(engine, t)
            settle(engine)
            save(engine, placed, place, run)
            seen = masters(engine), moments(engine), settings(engine)
            published = gather_weights(engine)
            for t in range(SAVED, ALL):
                update(engine, t)
            found[run] = *seen, masters(engine), published
    return found


def moments(engine: Any) -> dict[str, dict[str, torch.Tensor]]:
    """name -> key -> the optimizer's state, as ``deepspeed.utils`` finds it, or torch keeps it in stage 0."""
    config, states = engine._config.zero_config, engine.basic_optimizer.state
    if not engine.zero_optimization():  # in half precision it is of the fp32 copies, which have no names
        named = engine.module.named_parameters()
        return {
            name: {key: v.clone() for key, v in states[p].items() if isinstance(v, torch.Tensor) and v.dim()}
            for name, p in named
            if p in states
        }
    if config.round_robin_gradients:  # with it DeepSpeed finds others' elements
        return {}
    if (
        engine.zero_optimization_stage() < 3
    ):  # DeepSpeed links them after the first group's first step: the others' are missing
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    keys = [
        key
        for key in ("momentum_buffer", "exp_avg", "exp_avg_sq")
        if key in next(iter(engine.basic_optimizer.state.values()))
    ]
    return {
        name: {key: deepspeed.utils.safe_get_full_optimizer_state(p, key).clone() for key in keys}
        for name, p in engine.module.named_parameters()
        if p.requires_grad
    }


def moved(place: Path, ranks: int) -> dict[tuple[Run, Run], Any]:
    """In a rank: load each checkpoint into another layout, save it from there, and train on."""
    found = {}
    for source in SOURCES:
        for run in targets(source, ranks):
            with run.start(seed=1) as (engine, placed):
                saved = whole(place, source)
                lost = load_into(engine, saved, placed, layout_of(engine, placed))
                if engine.agvm:
                    engine.agvm.load_state_dict(saved.common["agvm"], strict=False)
                there = place / f"from {source}"
                save(engine, placed, there, run)
                steps = engine.global_steps
                for t in range(SAVED, ALL):
                    update(engine, t)
                found[source, run] = lost, steps, masters(engine), settings(engine)
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reshard")


@pytest.fixture(scope="module")
def before(place: Path) -> dict[Run, Any]:
    return dict(run_ranks(sources, 2, place, place)[0])


@pytest.fixture(scope="module")
def after(place: Path, before: dict[Run, Any]) -> dict[tuple[Run, Run], Any]:
    found: dict[tuple[Run, Run], Any] = {}
    for ranks in (1, 3):
        found |= run_ranks(moved, ranks, place, place, ranks)[0]
    return found


@pytest.mark.parametrize("run", SOURCES, ids=str)
def test_a_checkpoint_read_whole_is_what_the_engine_had(run: Run, place: Path, before: dict[Run, Any]) -> None:
    weights, states, _, _, published = before[run]
    assert identical(dict(sorted(published.items())), dict(sorted(weights.items()))), "what is evaluated and published"
    assert bool(states) != (run.extra == "round robin" or (run.stage == 0 and run.bf16))
    saved = whole(place, run)
    assert identical(dict(sorted(saved.weights().items())), dict(sorted(weights.items())))
    for name, state in states.items():
        found = saved.parameter(name).state
        assert set(state) <= set(found)
        assert all(torch.equal(found[key], value.reshape(-1)) for key, value in state.items())


@pytest.mark.parametrize(("source", "run"), [(s, r) for s in SOURCES for n in (1, 3) for r in targets(s, n)], ids=str)
def test_nothing_is_lost_in_another_layout(
    source: Run, run: Run, place: Path, before: dict[Run, Any], after: dict[tuple[Run, Run], Any]
) -> None:
    """Saved again from there it is the same to the bit; and training goes on as it would have, but for rounding."""
    lost, steps, end, kept = after[source, run]
    one, other = whole(place, source), whole(place / f"from {source}", run)
    assert lost == []
    assert steps == SAVED
    rounded = "frozen" if run.bf16 and not source.bf16 else None  # of which bf16 keeps no fp32 copy
    kept_weights = [
        {name: value for name, value in sorted(state.weights().items()) if name.split(".")[0] != rounded}
        for state in (one, other)
    ]
    assert identical(*kept_weights)
    for name in one.layout.parameters:
        assert identical(
            dict(sorted(one.parameter(name).state.items())), dict(sorted(other.parameter(name).state.items()))
        )
    if not run.modules:
        assert kept == before[source][2], "rates and decays are those of the checkpoint"
    if run.agvm and not run.modules:
        # aux_head has no gradient: DeepSpeed's stage 0 leaves it alone, the others step it with a gradient of zero.
        names = [name for name in end if not name.startswith(("aux_head", "frozen"))]
        begun, there = before[source][0], before[source][3]
        off = {name: (end[name] - there[name]).abs().max().item() for name in names}
        gone = max((there[name] - begun[name]).abs().max().item() for name in names)
        assert max(off.values()) < (0.05 * gone if run.bf16 or source.bf16 else 2e-6), off
