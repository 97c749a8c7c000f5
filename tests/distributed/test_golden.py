"""The official AGVM implementation's exact history on a toy model, in every ZeRO stage.

tests/golden/official_sgd_4ranks.json was written by the official code (SGD, momentum 0.9, weight decay 1e-4, 4 ranks) on
tests/golden/toy.py: the scale factors after each update, and the parameters after the last.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines import parameters, started
from tests.golden.toy import Toy, micro_batch
from tests.launch import run_ranks

HISTORY = json.loads((Path(__file__).parents[1] / "golden" / "official_sgd_4ranks.json").read_text())
ARGS = HISTORY["args"]
BUCKETS = (500_000_000, 100)
RUNS = [(stage, bucket) for stage in range(4) for bucket in BUCKETS]


def config(stage: int, bucket: int) -> dict[str, Any]:
    """The official run in our words."""
    return {
        "train_micro_batch_size_per_gpu": ARGS["b"],
        "gradient_clipping": ARGS["clip"],
        "steps_per_print": 10**9,
        "optimizer": {"type": "SGD", "params": {"lr": ARGS["lr"], "momentum": 0.9, "weight_decay": 1e-4}},
        "zero_optimization": {"stage": stage},
        "agvm": {
            "estimator": "split",
            "interval": ARGS["interval"],
            "start_step": ARGS["start"],
            "ema_decay": ARGS["ema"],
            "reduce_bucket_size": bucket,
        },
    }


def train(stage: int, bucket: int) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """In a rank: the scale factors after each update, the parameters after the last."""
    history = []
    with started(config(stage, bucket), Toy(seed=ARGS["seed"])) as engine:  # type: ignore[arg-type]
        for t in range(ARGS["steps"]):
            x, y = micro_batch(t, engine.global_rank, ARGS["b"], ARGS["seed"])
            engine.backward(engine(x.to(engine.device), y.to(engine.device)))
            engine.step()
            history.append(dict(engine.agvm.scale_factors))
        return history, {name: p.cpu() for name, p in parameters(engine).items()}


def train_all() -> list[tuple[list[dict[str, float]], dict[str, torch.Tensor]]]:
    """In a rank: one stage after another."""
    return [train(*run) for run in RUNS]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Any]:
    found = run_ranks(train_all, ARGS["ranks"], tmp_path_factory.mktemp("golden"))
    return dict(zip(RUNS, found[0], strict=True))


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_it_is_the_official_history(run: tuple[int, int], runs: dict[tuple[int, int], Any]) -> None:
    """Fp32 against fp32: measured, 6e-8 in the scale factors and in the parameters."""
    history, last = runs[run]
    official = HISTORY["scale_factors"]
    assert list(history[0]) == HISTORY["modules"]
    factors = max(
        abs(seen[name] - right)
        for seen, row in zip(history, official, strict=True)
        for name, right in zip(HISTORY["modules"], row, strict=True)
    )
    values = max((last[name].flatten() - torch.tensor(v)).abs().max().item() for name, v in HISTORY["params"].items())
    print(f"stage {run[0]}, buckets of {run[1]}: scale factors {factors:.1e}, parameters {values:.1e}")
    assert factors < 5e-7
    assert values < 5e-7


def test_the_history_moves() -> None:
    """What is compared differs between modules and from update to update."""
    last = dict(zip(HISTORY["modules"], HISTORY["scale_factors"][-1], strict=True))
    assert last["backbone"] == 1.0
    assert min(abs(last[name] - 1) for name in HISTORY["modules"] if name != "backbone") > 0.05
