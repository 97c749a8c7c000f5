"""Who had bad numbers, in words; the key; when a skipped update is no fault. Whole launches are in tests/distributed."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmcv import Config
from torch import nn

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.checks.image_names import names_of
from agvm_ds.mmdet.detector.nonfinite import MicroBatch, NonFiniteError, NumberWatch, _not_finite
from agvm_ds.mmdet.detector.overflow import loss_scaled
from agvm_ds.mmdet.limits import refuse_unsupported
from agvm_ds.mmdet.plan import Batch, Plan

PLAIN = {"runner": {"type": "IterBasedRunner", "max_iters": 1}, "workflow": [("train", 1)], "data": {"train": {}}}


@pytest.mark.parametrize("value", [-1, 1.0, True, "2", None, [1]])
def test_the_key_must_be_a_number_of_updates(value: Any) -> None:
    cfg = Config({**PLAIN, "max_nonfinite_updates": value})
    with pytest.raises(ConfigError, match=r"max_nonfinite_updates = .*: must be an integer: how many updates in a row"):
        refuse_unsupported(cfg, Plan({}, Batch(4, 2, 1, 2), None))


@pytest.mark.parametrize("value", [{}, {"max_nonfinite_updates": 0}, {"max_nonfinite_updates": 7}])
def test_zero_and_more_are_allowed(value: dict[str, Any]) -> None:
    cfg = Config({**PLAIN, **value})
    refuse_unsupported(cfg, Plan({}, Batch(4, 2, 1, 2), None))


def dataset(prefix: str, *ids: int) -> Any:
    infos = [{"filename": f"{key}.png", "id": key} for key in ids]
    return SimpleNamespace(img_prefix=prefix, data_infos=infos)


def test_images_are_named_by_file_and_id_through_wrappers() -> None:
    both = SimpleNamespace(datasets=[dataset("a", 1, 2), SimpleNamespace(dataset=dataset("b/", 1, 3))])
    metas = [{"filename": "b/1.png"}, {"filename": "a/2.png"}, {"filename": "c/9.png"}, {"ori_filename": "z.png"}, {}]
    assert names_of(metas, both) == ["b/1.png (id 1)", "a/2.png (id 2)", "c/9.png", "z.png", "of no name"]
    infos = [{"filename": "x.png"}, "y.png"]
    assert names_of(metas[:1], SimpleNamespace(img_prefix=None, data_infos=infos)) == ["b/1.png"], "no id"
    assert names_of(metas[:1], None) == ["b/1.png"]


def test_the_loss_terms_that_are_not_finite_are_named() -> None:
    terms = {
        "loss_cls": [torch.tensor(1.0), torch.tensor([1.0, math.inf])],
        "loss_bbox": torch.tensor([math.nan, 1.0]),
        "loss_mask": torch.tensor(1.0),
        "acc": torch.tensor(math.nan),
    }
    found = _not_finite(torch.tensor(math.nan), terms)
    assert list(found) == ["loss_cls", "loss_bbox"] and found["loss_cls"] == math.inf
    large = {"loss_cls": torch.tensor(3e38), "loss_bbox": torch.tensor(3e38)}
    assert _not_finite(torch.tensor(math.inf), large) == {"loss": math.inf}, "their sum overflows"
    assert _not_finite(torch.tensor(2.0), {"loss_cls": torch.tensor(2.0)}) == {}


def test_a_micro_batch_in_words() -> None:
    one = MicroBatch(
        1, ["a.png (id 3)", "b.png"], {"loss_cls": math.nan}, {"neck": ["neck.w", "neck.b"], "backbone": ["b.w"]}
    )
    assert str(one) == (
        "micro-batch 1; loss_cls = nan; gradients of neck: neck.w and 1 more; gradients of backbone: b.w; "
        "images a.png (id 3), b.png"
    )


def engine(applied: bool = True, fp16: bool = False, dynamic: bool = True, scaler: Any = None) -> Any:
    """As much of one as a NumberWatch asks for between updates."""
    return SimpleNamespace(
        module=nn.Linear(2, 2),
        optimizer=SimpleNamespace(overflow=not applied),
        agvm=None,
        torch_autocast_z0_gradscaler=scaler,
        fp16_enabled=lambda: fp16,
        dynamic_loss_scale=lambda: dynamic,
        was_step_applied=lambda: applied,
        gradient_accumulation_steps=lambda: 1,
        global_steps=5,
        micro_steps=5,
    )


def test_with_a_dynamic_loss_scale_an_overflow_is_no_fault() -> None:
    """DeepSpeed's normal course in fp16. (No GPU here: the engine is a stand-in.)"""
    assert loss_scaled(engine(fp16=True))
    assert loss_scaled(engine(scaler=object()))
    assert not loss_scaled(engine(fp16=True, dynamic=False)), "nothing would ever lower that scale"
    assert not loss_scaled(engine())
    for scaled in (engine(False, fp16=True), engine(False, scaler=object())):
        watch = NumberWatch(scaled)
        watch.begin()
        watch.end(lambda: pytest.fail("taken again"))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda found, own: found.__setitem__(0, own))


@pytest.mark.usefixtures("alone")
def test_a_bad_loss_is_a_fault_with_a_loss_scale_too() -> None:
    watch = NumberWatch(engine(False, fp16=True), limit=1)
    metas = [{"filename": "a.png"}]
    bad = torch.tensor(math.inf)
    watch.begin()
    assert math.isnan(watch.checked(bad, math.inf, {"loss_cls": bad}, metas)), "its gradients are made nan"
    watch.end(lambda: pytest.fail("taken again"))
    watch.begin()
    with pytest.raises(
        NonFiniteError, match=r"update 5: a loss is not finite\n  rank 0, micro-batch 0; loss_cls = inf; "
    ):
        watch.checked(bad, math.inf, {"loss_cls": bad}, metas)


@pytest.mark.usefixtures("alone")
def test_a_good_update_ends_the_row() -> None:
    watch, good, bad = NumberWatch(engine(), limit=1), torch.tensor(1.0), torch.tensor(math.nan)
    for loss in (good, bad, good, bad, good, good, bad):
        watch.begin()
        watch.checked(loss, float(loss), {"loss_cls": loss}, [{}])
        watch.end(lambda: None)
    assert watch.in_a_row == 1


@pytest.mark.usefixtures("alone")
def test_a_mean_that_overflows_is_told_as_such() -> None:
    watch = NumberWatch(engine())
    watch.begin()
    with pytest.raises(NonFiniteError, match=r"each rank's own is finite: .*\n  rank 0, micro-batch 0; images a\.png"):
        watch.checked(torch.tensor(1.0), math.inf, {"loss_cls": torch.tensor(1.0)}, [{"filename": "a.png"}])
