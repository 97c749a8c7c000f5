"""The noise scale that real ranks measure, on a problem where an image's gradient is the image: known in closed form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import comm
from torch import nn

from agvm_ds.monitor import JsonLines
from agvm_ds.report.advice import ALL, advise
from agvm_ds.report.measures import read_measures
from tests.engines import ds_config, started
from tests.launch import run_ranks

MICRO, ACCUMULATION, RANKS, UPDATES = 8, 2, 2, 600
PARTS = {"backbone": (64, 1.0, 0.5), "head": (16, 2.0, 2.0)}
"""Module -> elements d, standard deviation s of an image's gradient in each, length of the true one: B = d s^2 / length^2."""


class Sums(nn.Module):
    """The loss is linear in the weights, so that no step changes a gradient."""

    def __init__(self) -> None:
        super().__init__()
        for name, (d, _, _) in PARTS.items():
            setattr(self, name, nn.Linear(d, 1, bias=False))

    def forward(self, images: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum((getattr(self, name)(images[name]).mean() for name in PARTS), torch.zeros(()))


def drawn(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A micro-batch."""
    return {
        name: length / d**0.5 + s * torch.randn(MICRO, d, generator=generator) for name, (d, s, length) in PARTS.items()
    }


def measured(stage: int, place: Path) -> None:
    """In a rank: train, and leave agvm.jsonl."""
    block = {"interval": 1, "precondition": "none"}
    config = ds_config(stage, ACCUMULATION, "SGD", block, train_micro_batch_size_per_gpu=MICRO)
    generator = torch.Generator().manual_seed(comm.get_rank())
    with started(config, Sums()) as engine:
        if comm.get_rank() == 0:
            engine.agvm.listeners.append(JsonLines(place / "agvm.jsonl", engine.agvm))
        for _ in range(UPDATES * ACCUMULATION):
            engine.backward(engine(drawn(generator)))
            engine.step()


@pytest.mark.parametrize("stage", [0, 2])
def test_the_advice_is_that_of_the_closed_form(stage: int, tmp_path: Path) -> None:
    run_ranks(measured, RANKS, tmp_path, stage, tmp_path)
    measures = read_measures(tmp_path / "agvm.jsonl")
    assert measures is not None and len(measures.updates) == UPDATES
    found = advise(measures, MICRO * ACCUMULATION * RANKS, part=1.0)
    closed: dict[str, Any] = {name: d * s**2 / length**2 for name, (d, s, length) in PARTS.items()}
    closed[ALL] = sum(d * s**2 for d, s, _ in PARTS.values()) / sum(length**2 for *_, length in PARTS.values())
    for name, value in closed.items():
        assert found.critical[name].value == pytest.approx(value, rel=0.1), name
    assert found.limits == "head"
    last = json.loads((tmp_path / "agvm.jsonl").read_text().splitlines()[-1])
    assert last["samples"] == UPDATES * MICRO * ACCUMULATION * RANKS
