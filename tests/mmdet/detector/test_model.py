"""What hooks read of an update that is made of several micro-batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmcv.parallel import DataContainer
from mmdet.core.hook import CheckInvalidLossHook
from torch import nn

from agvm_ds.mmdet.detector import model
from agvm_ds.mmdet.detector.model import _merge, put_on, to_device


def output(loss: float, samples: int, **log_vars: float) -> dict[str, Any]:
    return {"loss": torch.tensor(loss), "log_vars": {"loss": loss, **log_vars}, "num_samples": samples}


def test_losses_are_means_over_the_micro_batches_that_have_them() -> None:
    merged = _merge([output(1.0, 4, acc=3.0), output(3.0, 2)])
    assert merged["log_vars"] == {"loss": 2.0, "acc": 3.0}
    assert (float(merged["loss"]), merged["num_samples"]) == (2.0, 6)


def test_the_hook_that_checks_losses_finds_one() -> None:
    """Once a KeyError."""

    class Runner:
        iter = 0
        logger = type("Logger", (), {"info": lambda *_: None})()
        outputs = _merge([output(1.0, 4), output(2.0, 4)])

    CheckInvalidLossHook(1).after_train_iter(Runner())
    Runner.outputs = _merge([output(1.0, 4), output(float("nan"), 4)])
    with pytest.raises(AssertionError):
        CheckInvalidLossHook(1).after_train_iter(Runner())


class Doubled(nn.Module):
    """A detector whose loss tells its weight."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, img: torch.Tensor, img_metas: Any, return_loss: bool) -> dict[str, torch.Tensor]:
        return {"loss": 2 * img.mean() * self.weight}


def test_a_val_phase_has_the_losses_of_what_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the engine's weights, which are cut, rounded, and no averages."""
    found = lambda _, losses: (losses["loss"], {"loss": float(losses["loss"])})  # noqa: E731
    monkeypatch.setattr(model, "parse_losses", found)
    engine: Any = SimpleNamespace(module=Doubled(1.0), device="cpu")
    batch = {"img": DataContainer([torch.full((2, 1), 3.0)]), "img_metas": DataContainer([[{}, {}]], cpu_only=True)}
    step = model.EngineModel(engine, None, None, Doubled(5.0)).val_step([batch, batch])  # type: ignore[arg-type]
    assert (step["log_vars"], step["num_samples"]) == ({"loss": 30.0}, 4)


def test_a_batch_is_opened_for_the_cpu_without_a_copy() -> None:
    images, boxes = torch.rand(2, 3, 4, 4), [torch.rand(1, 4), torch.rand(2, 4)]
    batch = {"img": DataContainer([images], stack=True), "gt_bboxes": DataContainer([boxes])}
    opened = to_device(batch, "cpu")
    assert opened["img"].data_ptr() == images.data_ptr()
    assert [one.data_ptr() for one in opened["gt_bboxes"]] == [one.data_ptr() for one in boxes]


def test_a_batch_goes_to_the_device_but_for_what_stays_on_the_cpu() -> None:
    """The meta device stands for any that is no CPU."""
    kept = torch.ones(2)
    batch = {
        "img": DataContainer([torch.ones(2, 3)], stack=True),
        "gt_bboxes": DataContainer([[torch.ones(1, 4), torch.ones(2, 4)]]),
        "img_metas": DataContainer([[{"kept": kept}]], cpu_only=True),
        "tested": [torch.ones(1), DataContainer([[torch.ones(1)]])],
        "number": 3,
    }
    found = to_device(batch, torch.device("meta"))
    tensors = [found["img"], *found["gt_bboxes"], found["tested"][0], *found["tested"][1]]
    assert [one.device.type for one in tensors] == ["meta"] * 5
    assert found["img_metas"] == [{"kept": kept}] and kept.device.type == "cpu" and found["number"] == 3
    assert [len(boxes) for boxes in to_device(batch, "cpu")["gt_bboxes"]] == [1, 2]


class Taught(nn.Linear):
    """A teacher that is no submodule, as mmdet's distillation has it."""

    def cuda(self, device: Any = None) -> Any:
        self.moved = device
        return self


def test_a_teacher_is_taken_along_to_a_gpu() -> None:
    taught = Taught(1, 1)
    assert put_on(taught, "cpu") is taught and not hasattr(taught, "moved")
    assert put_on(taught, "cuda:1") is taught and taught.moved == torch.device("cuda", 1)


@pytest.mark.parametrize(("device", "expected"), [("cuda:1", "cuda:1"), ("cpu", None)])
def test_mmcvs_log_finds_the_device_on_which_ranks_share_numbers(device: str, expected: str | None) -> None:
    """As DDP has it: NCCL reduces no CPU tensor."""
    engine: Any = SimpleNamespace(module=nn.Linear(1, 1), device=torch.device(device))
    found = model.EngineModel(engine, None).output_device  # type: ignore[arg-type]
    assert found == (None if expected is None else torch.device(expected))
