"""What only a GPU does at once: reductions on a stream of their own, copies to the host's memory, and AGVM reading shards.

A model large enough that a stream is not done when the next is started. Each way is compared, update for update, with the
one that waits for everything: stage 0, one stream. On a CPU it passes as well, and shows less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

from tests.engines import OPTIONS, ds_config, started
from tests.launch import run_ranks

LAYERS, WIDTH, ROWS, ACCUMULATION, UPDATES = 16, 1024, 64, 2, 6
BUCKET = 2_000_000
"""Elements: some eight reductions a backward."""
PINNED = {"device": "cpu", "pin_memory": True}
PARTITIONED = {"stage": 3, "stage3_param_persistence_threshold": 0}
ZERO: dict[str, dict[str, Any]] = {
    "stage 1": {"stage": 1},
    "stage 1, overlap_comm": {"stage": 1, "overlap_comm": True},
    "stage 2": {"stage": 2, "overlap_comm": False},
    "stage 2, overlap_comm": {"stage": 2, "overlap_comm": True},
    "stage 3": {**PARTITIONED, "overlap_comm": False},
    "stage 3, overlap_comm": {**PARTITIONED, "overlap_comm": True},
    "stage 1, offload": {"stage": 1, "offload_optimizer": PINNED},
    "stage 2, offload": {"stage": 2, "overlap_comm": True, "offload_optimizer": PINNED},
    "stage 3, offload": {**PARTITIONED, "overlap_comm": True, "offload_optimizer": PINNED, "offload_param": PINNED},
}
WAITING = "stage 0"
WAYS = [("SGD", "pairwise"), ("SGD", "split"), ("AdamW", "pairwise")]


@dataclass
class Seen:
    """After an update: what was measured, and of each parameter how far it is from where it began, and which way."""

    variances: dict[str, float]
    scale_factors: dict[str, float]
    moved: dict[str, float]
    """The length of the way."""
    along: dict[str, float]
    """Its length in one random direction."""


class Deep(nn.Module):
    """Two halves of many layers, whose gradients are of one size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(*(layer() for _ in range(LAYERS // 2)))
        self.head = nn.Sequential(*(layer() for _ in range(LAYERS // 2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.head(self.backbone(x)) - x).square().mean()


def layer() -> nn.Module:
    linear = nn.Linear(WIDTH, WIDTH)
    nn.init.xavier_uniform_(linear.weight, nn.init.calculate_gain("tanh"))
    return nn.Sequential(linear, nn.Tanh())


def train(base: str, estimator: str, zero: dict[str, Any]) -> list[Seen]:
    """In a rank: what is seen after each update."""
    block = {"interval": 1, "start_step": 0, "estimator": estimator, "ema_decay": 0.5}
    more = {
        "train_micro_batch_size_per_gpu": ROWS,
        # AdamW is DeepSpeed's, on a GPU and offloaded.
        "optimizer": {"type": base, "params": OPTIONS[base] | {"weight_decay": 0.0}},
        "zero_optimization": {"reduce_bucket_size": BUCKET, **zero},
        "zero_force_ds_cpu_optimizer": False,
    }
    config = ds_config(zero["stage"], ACCUMULATION, base, block, **more)
    model, seen = Deep(), []
    begun = {name: p.detach().clone() for name, p in model.named_parameters()}
    with started(config, model) as engine:
        generator = torch.Generator().manual_seed(engine.global_rank)
        for _ in range(UPDATES):
            for _ in range(ACCUMULATION):
                engine.backward(engine(torch.randn(ROWS, WIDTH, generator=generator).to(engine.device)))
                engine.step()
            seen.append(Seen(dict(engine.agvm.variances), dict(engine.agvm.scale_factors), *way(engine, begun)))
    return seen


def way(engine: Any, begun: dict[str, torch.Tensor]) -> tuple[dict[str, float], dict[str, float]]:
    """Of each parameter: how far it has moved, and how far in a random direction."""
    direction, moved, along = torch.Generator().manual_seed(1), {}, {}
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            step = p.detach().cpu().double() - begun[name].double()
        moved[name] = step.norm().item()
        along[name] = (step * torch.randn(step.shape, generator=direction)).sum().item()
    return moved, along


Runs = dict[tuple[str, tuple[str, str]], list[Seen]]


def everything() -> Runs:
    """In a rank: the right one first."""
    ways = {WAITING: {"stage": 0}, **ZERO}
    return {(name, way): train(*way, zero) for name, zero in ways.items() for way in WAYS}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    found = run_ranks(everything, 2, tmp_path_factory.mktemp("streams"), timeout=900)
    assert found[0] == found[1], "the ranks disagree"
    return dict(found[0])


@pytest.mark.gpu
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", ZERO)
def test_every_update_is_that_of_the_one_that_waits(name: str, way: tuple[str, str], runs: Runs) -> None:
    for seen, right in zip(runs[name, way], runs[WAITING, way], strict=True):
        assert seen.variances == pytest.approx(right.variances, abs=1e-4)
        assert seen.scale_factors == pytest.approx(right.scale_factors, abs=1e-4)
        for parameter, length in right.moved.items():
            assert length > 1e-4, "it moves"
            assert seen.moved[parameter] == pytest.approx(length, rel=1e-3), parameter
            assert seen.along[parameter] == pytest.approx(right.along[parameter], abs=1e-3 * length), parameter
