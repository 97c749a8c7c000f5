"""Averaged weights in every ZeRO stage and precision, against mmcv's and mmdet's hooks on a plain copy of the model."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmcv.runner import HOOKS
from mmcv.utils import build_from_cfg

from agvm_ds.mmdet.detector.weights import gather_weights, keep_unrounded
from agvm_ds.mmdet.hooks.custom import engine_hooks
from agvm_ds.mmdet.hooks.ema import use_averages
from tests.engines import identical, update
from tests.launch import run_ranks
from tests.layouts import Run
from tests.models import Tied
from tests.toy import FEATURES

AVERAGING: list[dict[str, Any]] = [
    {"type": "EMAHook", "momentum": 0.3, "warm_up": 2},
    {"type": "ExpMomentumEMAHook", "momentum": 0.2, "total_iter": 4},
    {"type": "LinearMomentumEMAHook", "momentum": 0.5, "warm_up": 3, "interval": 2},
    {"type": "ExpMomentumEMAHook", "momentum": 0.3, "total_iter": 2, "skip_buffers": True},
]
UPDATES = 5

RUNS = [
    *(Run(2, stage, "AdamW", bf16=bf16) for stage in range(4) for bf16 in (False, True)),
    Run(2, 0, "SGD", agvm=False),
    Run(2, 1, "AdamW", bf16=True, extra="fp32 accumulation"),
    Run(2, 2, "AdamW", extra="round robin"),
    Run(2, 1, "AdamW", extra="aligned"),
    Run(2, 3, "AdamW", extra="sub-groups"),
    Run(2, 2, "AdamW", extra="offload"),
    Run(2, 3, "AdamW", bf16=True, extra="offload"),
]


class WithBuffers(Tied):
    """Statistics that training changes on each rank in its own way, a count, a constant; and a weight with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("third", torch.full((1,), 1 / 3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.mean.lerp_(x.mean(0).to(self.mean.dtype), 0.1)
        self.count += 1
        return super().forward(x, y)


@dataclass
class Runner:
    """As much of a runner as the hooks read."""

    engine: Any
    saving: Any
    model: Any = None
    iter: int = 0
    hooks: list[Any] = field(default_factory=list)

    def call(self, name: str) -> None:
        for hook in self.hooks:
            getattr(hook, name)(self)

    def weights(self) -> dict[str, torch.Tensor]:
        return use_averages(gather_weights(self.engine, self.saving.unrounded), self.hooks, self.saving.unrounded)


@contextmanager
def begun(run: Run) -> Any:
    """A runner with every hook of AVERAGING."""
    model = WithBuffers()
    unrounded = keep_unrounded(model) if run.bf16 else {}
    with run.start(model=model) as (engine, placed):
        runner = Runner(engine, SimpleNamespace(placed=placed, unrounded=unrounded))
        runner.hooks = [build_from_cfg(hook, HOOKS) for hook in engine_hooks(AVERAGING)]
        yield runner


def trained(runner: Runner) -> dict[str, torch.Tensor]:
    """The trained weights in fp32, and rank 0's buffers; each rank keeps its own."""
    own = [buffer.clone() for buffer in runner.engine.module.buffers()]
    weights = gather_weights(runner.engine, runner.saving.unrounded)
    for buffer, value in zip(runner.engine.module.buffers(), own, strict=True):
        buffer.copy_(value)
    return weights


class Reference:
    """The hooks themselves, each on a plain float32 copy that is given the trained weights after every update."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.hooks, self.runners = [], []
        for hook in AVERAGING:
            net = WithBuffers()
            net.load_state_dict(weights)
            self.runners.append(SimpleNamespace(model=net, iter=0))
            self.hooks.append(build_from_cfg(hook, HOOKS))
            self.hooks[-1].before_run(self.runners[-1])

    def follow(self, weights: dict[str, torch.Tensor]) -> None:
        for hook, runner in zip(self.hooks, self.runners, strict=True):
            runner.model.load_state_dict(weights, strict=False)
            hook.after_train_iter(runner)
            runner.iter += 1

    def published(self, index: int, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights with a hook's averages in their place."""
        hook = self.hooks[index]
        averages = {name: hook.model_buffers[hook.param_ema_buffer[name]].clone() for name in hook.model_parameters}
        averages["aux_head.weight"] = averages["roi_head.bbox_head.weight"]  # one weight, which EMAHook has once
        return weights | averages


def followed() -> dict[Run, Any]:
    """In a rank: for each run, each hook's published weights and its reference's, the trained ones, what a state holds."""
    warnings.filterwarnings("ignore", "This overload of add_")
    found = {}
    for run in RUNS:
        with begun(run) as runner:
            runner.call("before_run")
            reference = Reference(trained(runner))
            runner.call("before_train_epoch")
            for t in range(UPDATES):
                update(runner.engine, t)
                runner.call("after_train_iter")
                runner.iter += 1
                reference.follow(trained(runner))
            state = [hook.averages() for hook in runner.hooks]
            within = runner.weights()
            pairs = []
            for index, hook in enumerate(runner.hooks):
                hook.after_train_epoch(runner)
                pairs.append((runner.weights(), reference.published(index, within)))
                hook.before_train_epoch(runner)
            found[run] = pairs, within, trained(runner), state
    return found


def moved(file: Path, ranks: int) -> dict[Run, Any]:
    """In a rank: the averages of each run, put into another layout, whose weights are others, and read there."""
    found, states = {}, torch.load(file, weights_only=False)
    for number, (run, state) in enumerate(states.items()):
        with begun(replace(run, ranks=ranks, stage=number % 4, bf16=number % 3 == 0, extra="")) as runner:
            for hook, averages in zip(runner.hooks, state, strict=True):
                hook.take(runner, averages if runner.engine.global_rank == 0 else {})
            runner.call("before_run")
            found[run] = [hook.averages() for hook in runner.hooks]
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Run, Any]]:
    """By rank."""
    return list(run_ranks(followed, 2, tmp_path_factory.mktemp("averages")))


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_the_averages_are_those_of_the_hooks_on_a_plain_model(run: Run, results: list[dict[Run, Any]]) -> None:
    """Bit for bit; but of what training leaves alone the hooks' average drifts by rounding, and here it is what it was."""
    pairs, within, *_ = results[0][run]
    for published, expected in pairs:
        assert published.keys() == expected.keys()
        for name in expected:
            if name.startswith("frozen") or (name == "third" and run.bf16):
                assert torch.equal(published[name], within[name])
                assert torch.allclose(published[name], expected[name], rtol=0, atol=1e-7)
            else:
                assert torch.equal(published[name], expected[name]), name
        assert (published["neck.weight"] - within["neck.weight"]).abs().max() > 1e-3, "not the trained weights"


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_ranks_publish_the_same_and_training_does_not_see_it(run: Run, results: list[dict[Run, Any]]) -> None:
    pairs, within, after, state = results[0][run]
    others, *_, other_state = results[1][run]
    assert identical([published for published, _ in pairs], [published for published, _ in others])
    assert identical(state, other_state)
    assert identical(within, after)


@pytest.mark.parametrize("ranks", [1, 3])
def test_another_layout_goes_on_with_the_same_averages(
    ranks: int, results: list[dict[Run, Any]], tmp_path: Path
) -> None:
    states = {run: result[-1] for run, result in results[0].items()}
    torch.save(states, tmp_path / "states.pt")
    assert identical(run_ranks(moved, ranks, tmp_path, tmp_path / "states.pt", ranks)[0], states)
