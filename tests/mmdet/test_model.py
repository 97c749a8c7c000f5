"""What hooks read of an update that is made of several micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmcv.parallel import DataContainer
from mmdet.core.hook import CheckInvalidLossHook

from agvm_ds.mmdet.model import _merge, to_device


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


def test_a_batch_is_opened_for_the_cpu_without_a_copy() -> None:
    images, boxes = torch.rand(2, 3, 4, 4), [torch.rand(1, 4), torch.rand(2, 4)]
    batch = {"img": DataContainer([images], stack=True), "gt_bboxes": DataContainer([boxes])}
    opened = to_device(batch, "cpu")
    assert opened["img"].data_ptr() == images.data_ptr()
    assert [one.data_ptr() for one in opened["gt_bboxes"]] == [one.data_ptr() for one in boxes]
