"""nodes x GPUs x micro-batch x accumulation is the batch, or the command says which batches there are."""

from __future__ import annotations

from typing import Any

import pytest

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.planning.layout import Base, Layout, choose_layout
from agvm_ds.mmdet.planning.memory import GIB, HEADROOM, Footprint
from agvm_ds.mmdet.planning.request import Request

SGD = Base(moments=1, elementwise=False)
ROOM = 2.0
"""GiB, more than what is held beside activations here: DeepSpeed's buffer of 1.86 GiB."""
IMAGE = GIB // 10


def cut(nodes: int, gpus: int, batch: int, images: float, saved: int | None = IMAGE, **more: Any) -> Layout:
    """The layout on GPUs that hold so many images beside weights and buffers."""
    memory = ROOM + images * HEADROOM * IMAGE / GIB
    sizes = Footprint(1_000_000, 1_000_000, 1000, saved, "not known")
    return choose_layout(Request("c", nodes, gpus, batch, memory=memory, **more), sizes, more.get("micro") or 2, SGD)


@pytest.mark.parametrize(
    ("nodes", "gpus", "batch", "images", "micro", "accumulation"),
    [
        (4, 8, 512, 20, 16, 1),
        (4, 8, 512, 15, 8, 2),
        (8, 8, 512, 8, 8, 1),
        (16, 8, 512, 99, 4, 1),
        (3, 4, 108, 8, 3, 3),
        (1, 1, 16, 99, 8, 2),
    ],
)
def test_the_largest_micro_batch_that_fits_and_divides(
    nodes: int, gpus: int, batch: int, images: float, micro: int, accumulation: int
) -> None:
    found = cut(nodes, gpus, batch, images).batch
    assert (found.micro, found.accumulation) == (micro, accumulation)
    assert nodes * gpus * found.micro * found.accumulation == found.train == batch


@pytest.mark.parametrize(
    ("more", "images", "stage"),
    [({}, 16, 2), ({}, 8, 1), ({"zero_stage": 3}, 16, 3), ({"zero_stage": 0}, 1, 0), ({"micro": 4}, 0, 1)],
)
def test_the_stage_is_2_or_1_where_it_accumulates_or_the_one_asked_for(
    more: dict[str, Any], images: float, stage: int
) -> None:
    assert cut(4, 8, 512, images, **more).stage == stage


def test_where_2_holds_no_image_3_may() -> None:
    sizes = Footprint(4_000_000_000, 4_000_000_000, 1000, IMAGE, "")
    found = choose_layout(Request("c", 8, 8, 512, memory=16), sizes, 2, SGD)
    assert found.stage == 3
    found = choose_layout(Request("c", 8, 8, 512, memory=18), sizes, 2, SGD)
    assert found.stage == 2  # it accumulates, and 1 does not hold these gradients
    assert found.batch.accumulation > 1


def test_unknown_activations_leave_the_configs_micro_batch_as_the_limit() -> None:
    assert cut(4, 8, 512, 99, saved=None).batch.micro == 2
    with pytest.raises(ConfigError, match="estimated too small"):
        cut(4, 8, 512, -5, saved=None)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "does not divide": (
        {"batch": 500},
        "--batch 500: does not divide by 4 nodes x 8 GPUs a node = 32; the nearest that do: 480, 512$",
    ),
    "less than one a GPU": ({"batch": 20}, "= 32; the nearest that do: 32$"),
    "with a micro-batch": ({"micro": 3}, "x 3 images a micro-batch = 96; the nearest that do: 480, 576$"),
    "n = 1": ({"nodes": 1, "gpus": 1, "batch": 1}, "on one GPU: an update has n = 1 micro-batch"),
    "n = 1 asked for": ({"nodes": 1, "gpus": 1, "batch": 16, "micro": 16}, "or a smaller --micro"),
    "no memory": ({"memory": None}, "neither --memory nor --micro is given"),
    "too small": (
        {"memory": 2.0},
        r"--memory 2: estimated too small for one image a GPU in ZeRO stage 3: .* take 1.9 GiB, one image",
    ),
    "too small for what is asked": ({"memory": 2.0, "zero_stage": 1}, "in ZeRO stage 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_with_what_can(name: str) -> None:
    change, said = REFUSED[name]
    arguments = {"config": "c", "nodes": 4, "gpus": 8, "batch": 512, "memory": 80.0} | change
    with pytest.raises(ConfigError, match=said):
        choose_layout(Request(**arguments), Footprint(1_000_000, 1_000_000, 1000, IMAGE, ""), 2, SGD)
