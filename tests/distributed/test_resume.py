"""A run that is saved, ended and resumed by new processes is the run that was never interrupted, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from agvm_ds import AGVM, param_groups
from tests.engines import (
    AGVM_BLOCK,
    OPTIONS,
    Record,
    ds_config,
    heard,
    identical,
    parameters,
    record,
    started,
    train,
    update,
)
from tests.launch import run_ranks
from tests.toy import Toy

RANKS, ACCUMULATION = 2, 2
SAVED, ALL = 5, 10
"""Updates before the checkpoint and altogether: measured are 3, 6 and 9, clipped 2 to 7, so that it lies between."""
BLOCK = AGVM_BLOCK | {"interval": 3, "clip_window": [2, 7]}
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.01, "warmup_num_steps": 8}}
STAGES = range(4)


@dataclass(frozen=True)
class Case:
    """One training run. SGD has a torch scheduler of the caller's, AdamW one of the JSON."""

    stage: int
    base: str = "SGD"
    bf16: bool = False
    estimator: str = "pairwise"

    def __str__(self) -> str:
        kind = "" if self.estimator == "pairwise" else f" {self.estimator}"
        return f"stage{self.stage} {self.base}{' bf16' if self.bf16 else ''}{kind}"

    def start(self, model: Toy) -> Any:
        """Its engine, as a context."""
        more: dict[str, Any] = {"scheduler": WARMUP} if self.base == "AdamW" else {}
        more |= {"bf16": {"enabled": True}} if self.bf16 else {}
        block = BLOCK | {"precondition": "auto", "estimator": self.estimator, "reduce_bucket_size": 100}
        config = ds_config(self.stage, ACCUMULATION, self.base, block, gradient_clipping=0.3, **more)
        scheduler = None if self.base == "AdamW" else lambda optimizer: OneCycleLR(optimizer, 0.2, total_steps=12)
        return started(config, model, lr_scheduler=scheduler)


CASES = [
    *(
        Case(stage, base, estimator=how)
        for base in ("SGD", "AdamW")
        for how in ("pairwise", "split")
        for stage in STAGES
    ),
    *(Case(stage, bf16=True) for stage in STAGES),
]


def plain_agvm(stage: int, model: Toy) -> Any:
    """An engine with AGVM switched off and its optimizer given: the parameter groups are those of a run with AGVM."""
    optimizer = AGVM(param_groups(model), base=torch.optim.SGD, **OPTIONS["SGD"])
    return started(ds_config(stage, ACCUMULATION, agvm={"enabled": False}), model, optimizer=optimizer)


def before(place: Path) -> dict[Case, tuple[list[Record], list[Record]]]:
    """In a rank: runs that go through, and runs that end with a checkpoint; then checkpoints of other kinds."""
    runs = {}
    for case in CASES:
        with case.start(Toy()) as engine:
            whole = train(engine, range(ALL))
        with case.start(Toy()) as engine:
            first = train(engine, range(SAVED))
            engine.save_checkpoint(place / str(case), client_state={"epoch": 7})
        runs[case] = whole, first
    for stage in STAGES:
        with plain_agvm(stage, Toy()) as engine:
            for t in range(SAVED):
                update(engine, t)
            engine.save_checkpoint(place / f"plain {stage}")
        with started(ds_config(stage, ACCUMULATION, agvm=None)) as engine:
            update(engine, 0)
            engine.save_checkpoint(place / f"one group {stage}")
    return runs


def resumed(place: Path) -> dict[Case, tuple[Record, list[Record], Any]]:
    """In a rank: the state after loading, the rest of each run, and the caller's own state."""
    runs = {}
    for case in CASES:
        with case.start(Toy(seed=1)) as engine:
            _, client_state = engine.load_checkpoint(place / str(case))
            runs[case] = record(engine), train(engine, range(SAVED, ALL)), client_state["epoch"]
    return runs


def after(place: Path) -> tuple[dict[Case, tuple[Record, list[Record], Any]], dict[str, dict[int, Any]]]:
    """In a rank: everything that loads a checkpoint."""
    checks = [clipping, weights_alone, without_state, renamed_modules, other_modules, one_group]
    return resumed(place), {check.__name__: {stage: check(place, stage) for stage in STAGES} for check in checks}


def clipping(place: Path, stage: int) -> tuple[float, float]:
    """How far one update goes after loading into a run with a clip value of its own, and into one with none."""
    moved = []
    for max_norm in (1e-6, 0.0):
        config = ds_config(stage, ACCUMULATION, gradient_clipping=max_norm)
        config["optimizer"]["params"] |= {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
        with started(config, Toy(seed=1)) as engine:
            engine.load_checkpoint(place / f"stage{stage} SGD")
            for group in engine.basic_optimizer.param_groups:
                group.update(lr=0.1, momentum=0.0, nesterov=False, weight_decay=0.0)
            start = parameters(engine)
            update(engine, SAVED)
            moved.append(max((p - start[name]).abs().max().item() for name, p in parameters(engine).items()))
    return moved[0], moved[1]


def weights_alone(place: Path, stage: int) -> dict[str, Any]:
    """Load without optimizer states, by name and by position; then pass an update that must be measured."""
    found = {}
    for how, args, kwargs in (
        ("name", (), {"load_optimizer_states": False, "load_lr_scheduler_states": False}),
        ("position", (None, True, False, False), {}),
    ):
        with started(ds_config(stage, ACCUMULATION, agvm=AGVM_BLOCK | {"interval": SAVED}), Toy(seed=1)) as engine:
            engine.load_checkpoint(place / f"stage{stage} SGD", *args, **kwargs)
            loaded = engine.agvm.steps, dict(engine.agvm.scale_factors)
            update(engine, SAVED)
            found[how] = loaded, engine.agvm.variances
    return found


def without_state(place: Path, stage: int) -> tuple[int, dict[str, float], list[str], int]:
    """Load a checkpoint of a run without AGVM, and go on until the first measure."""
    config = ds_config(stage, ACCUMULATION, agvm=AGVM_BLOCK | {"interval": 3})
    with heard() as messages, started(config, Toy(seed=1)) as engine:
        engine.load_checkpoint(place / f"plain {stage}")
        loaded = engine.agvm.steps, dict(engine.agvm.scale_factors), list(messages)
        for t in range(SAVED, 7):
            update(engine, t)
        return *loaded, engine.agvm.measured


def refusal(stage: int, checkpoint: Path, modules: Any) -> str:
    """What is said when a checkpoint is loaded into a run with other modules."""
    with started(ds_config(stage, ACCUMULATION, agvm=AGVM_BLOCK | {"modules": modules})) as engine:
        try:
            engine.load_checkpoint(checkpoint)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "not refused"


def renamed_modules(place: Path, stage: int) -> str:
    names = {
        "backbone": "backbone",
        "NECK": "neck",
        "rpn_head": "rpn_head",
        "roi_head": "roi_head",
        "aux_head": "aux_head",
    }
    return refusal(stage, place / f"stage{stage} SGD", {name: [prefix] for name, prefix in names.items()})


def other_modules(place: Path, stage: int) -> str:
    return refusal(stage, place / f"stage{stage} SGD", ["backbone", "neck"])


def one_group(place: Path, stage: int) -> str:
    return refusal(stage, place / f"one group {stage}", None)


Runs = dict[str, Any]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What rank 0 saw before and after; the ranks agree."""
    place = tmp_path_factory.mktemp("resume")
    found: Runs = {}
    for name, function in (("before", before), ("after", after)):
        one, other = run_ranks(function, RANKS, place, place)
        if name == "before":
            assert identical(list(one.values()), list(other.values())), "the ranks disagree"
            found["before"] = one
        else:
            assert identical(list(one[0].values()), list(other[0].values())), "the ranks disagree"
            found["after"], found["checks"] = one
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_halves_are_the_whole(case: Case, runs: Runs) -> None:
    """Parameters, rates, scale factors, variances, noise scales and counters after every update, measured ones included."""
    whole, first = runs["before"][case]
    loaded, second, epoch = runs["after"][case]
    assert identical(first, whole[:SAVED]), "two runs of the same seed differ"
    assert identical(loaded, whole[SAVED - 1]), "what was loaded is not what was saved"
    assert identical(second, whole[SAVED:])
    assert epoch == 7, "the caller's own client_state comes back"
    assert [seen.measured for seen in whole] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert [seen.steps for seen in whole] == list(range(1, ALL + 1))
    print(f"{case}: {ALL - SAVED} updates after the checkpoint are bit-identical")


@pytest.mark.parametrize("stage", STAGES)
def test_the_clip_value_is_this_runs_and_not_the_checkpoints(stage: int, runs: Runs) -> None:
    """DeepSpeed's load brings ``clip_grad`` of the run that saved: here 0.3."""
    clipped, free = runs["checks"]["clipping"][stage]
    assert clipped < 2e-7
    assert free > 1e-2


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["name", "position"])
def test_loading_weights_alone_starts_scale_factors_at_one_and_measures(how: str, stage: int, runs: Runs) -> None:
    """The counter follows DeepSpeed's ``global_steps``, which is loaded with the weights; the next update is measured.

    It was not: the controller stood at update 0, had not observed the micro-gradients of update 5, and took their sum
    for zero, a variance of 0 in every module.
    """
    (steps, factors), variances = runs["checks"]["weights_alone"][stage][how]
    assert steps == SAVED
    assert set(factors.values()) == {1.0}
    assert all(0.05 < variances[name] < 2 for name in variances if name != "aux_head")


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_without_agvm_starts_scale_factors_at_one(stage: int, runs: Runs) -> None:
    steps, factors, messages, measured = runs["checks"]["without_state"][stage]
    assert steps == SAVED
    assert set(factors.values()) == {1.0}
    assert messages == ["AGVM: the checkpoint has no AGVM state: scale factors start at 1"]
    assert measured == 1, "update 6 is measured"


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_of_renamed_modules_is_refused(stage: int, runs: Runs) -> None:
    """DeepSpeed's load puts the checkpoint's group dicts in place of this run's: the names compared are from before."""
    message = runs["checks"]["renamed_modules"][stage]
    assert "'backbone', 'neck', 'rpn_head'" in message
    assert "'backbone', 'NECK', 'rpn_head'" in message
    assert message.startswith("ConfigError: ")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("check", ["other_modules", "one_group"])
def test_a_checkpoint_of_other_parameter_groups_is_refused(check: str, stage: int, runs: Runs) -> None:
    """DeepSpeed itself refuses it, in words about something else ("parameter-alignment layout"); ours come with them."""
    message = runs["checks"][check][stage]
    assert message.startswith("ConfigError: ")
    assert "['rest', 'backbone', 'neck'" in message
    assert "agvm.modules" in message
    assert "load_optimizer_states=False" in message


def test_an_absent_checkpoint_is_deepspeeds_own_answer(tmp_path: Path) -> None:
    assert run_ranks(load_nothing, 1, tmp_path, tmp_path) == [(None, None, 0)]


def load_nothing(place: Path) -> tuple[Any, Any, int]:
    """In a rank: load from a folder without checkpoints."""
    with started(ds_config(2, ACCUMULATION)) as engine:
        return *engine.load_checkpoint(place), engine.agvm.steps
