"""What only a GPU does at once: reductions on a stream of their own, copies to the host's memory, and AGVM reading shards.

A model large enough that a stream is not done when the next is started. Each way is compared, update for update, with the
one that waits for everything: stage 0, one stream.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.engines import OPTIONS, ds_config, started
from tests.launch import run_ranks

LAYERS, WIDTH, ROWS, ACCUMULATION, UPDATES = 16, 1024, 64, 2, 6
BUCKET = 2_000_000
"""Elements: some eight reductions a backward."""
ZERO: dict[str, dict[str, Any]] = {
    "stage 1": {"stage": 1},
    "stage 1, overlap_comm": {"stage": 1, "overlap_comm": True},
    "stage 2": {"stage": 2, "overlap_comm": False},
    "stage 2, overlap_comm": {"stage": 2, "overlap_comm": True},
    "stage 3": {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0},
    "stage 3, overlap_comm": {"stage": 3, "overlap_comm": True, "stage3_param_persistence_threshold": 0},
    "stage 1, offload": {"stage": 1, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
    "stage 2, offload": {"stage": 2, "overlap_comm": True, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
    "stage 3, offload": {
        "stage": 3,
        "overlap_comm": True,
        "stage3_param_persistence_threshold": 0,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
    },
}
WAYS = [("SGD", "pairwise"), ("SGD", "split"), ("AdamW", "pairwise")]
Seen = list[tuple[dict[str, float], float]]
"""After each update: the variances, and the sum of all weights' squares."""


class Deep(nn.Module):
    """Two halves of many layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(*(layer() for _ in range(LAYERS // 2)))
        self.head = nn.Sequential(*(layer() for _ in range(LAYERS // 2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.head(self.backbone(x)) - x).square().mean()


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())


def train(base: str, estimator: str, zero: dict[str, Any]) -> Seen:
    """In a rank."""
    block = {"interval": 1, "start_step": 0, "estimator": estimator, "ema_decay": 0.5}
    config = ds_config(0, ACCUMULATION, base, block, train_micro_batch_size_per_gpu=ROWS)
    if "offload_optimizer" in zero:  # DeepSpeed's CPU Adam; torch's SGD
        config["optimizer"]["params"].pop("torch_adam", None)
        config["zero_force_ds_cpu_optimizer"] = False
    else:
        config["optimizer"]["params"] = dict(OPTIONS[base])  # on a GPU AdamW is DeepSpeed's FusedAdam
    config["zero_optimization"] = {"reduce_bucket_size": BUCKET, **zero}
    seen: Seen = []
    with started(config, Deep()) as engine:
        generator = torch.Generator().manual_seed(engine.global_rank)
        for _ in range(UPDATES):
            for _ in range(ACCUMULATION):
                engine.backward(engine(torch.randn(ROWS, WIDTH, generator=generator).to(engine.device)))
                engine.step()
            seen.append((dict(engine.agvm.variances), _squares(engine)))
    return seen


def _squares(engine: Any) -> float:
    import deepspeed

    total = 0.0
    for p in engine.module.parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            total += p.detach().double().square().sum().item()
    return total


def everything() -> dict[tuple[str, tuple[str, str]], Seen]:
    """In a rank: the right one first."""
    ways = {"waiting": {"stage": 0}, **ZERO}
    return {(name, way): train(*way, zero) for name, zero in ways.items() for way in WAYS}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, tuple[str, str]], Seen]:
    found = run_ranks(everything, 2, tmp_path_factory.mktemp("streams"), timeout=500)
    assert found[0] == found[1], "the ranks disagree"
    return dict(found[0])


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", ZERO)
def test_every_update_is_that_of_the_one_that_waits(name: str, way: tuple[str, str], runs: Any) -> None:
    for (variances, weights), (right, right_weights) in zip(runs[name, way], runs["waiting", way], strict=True):
        assert variances == pytest.approx(right, abs=1e-4)
        assert weights == pytest.approx(right_weights, rel=1e-6)
    first, last = runs["waiting", way][0], runs["waiting", way][-1]
    assert abs(first[0]["head"] - last[0]["head"]) > 1e-3 and first[1] != last[1], "what is compared moves"
