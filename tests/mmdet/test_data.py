"""Loaders by updates: every attribute is mmdet's own loader's, and endless data are passed by unread."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmcv import ConfigDict
from mmdet.core.hook import YOLOXModeSwitchHook
from mmdet.datasets import build_dataloader
from torch.utils.data import DataLoader

from agvm_ds.config import ConfigError
from agvm_ds.mmdet import data
from agvm_ds.mmdet.configs import read_config
from agvm_ds.mmdet.data import UpdateLoader, _validated_as_trained, check_size
from agvm_ds.mmdet.plan import Batch
from tests.mmdet import coco


class Numbers:
    """As much of an mmdet data set as its samplers read: two groups of images."""

    def __init__(self, length: int) -> None:
        self.flag = np.arange(length) % 3 // 2
        self.skipped: Any = None

    def __len__(self) -> int:
        return len(self.flag)

    def __getitem__(self, index: int) -> int:
        return int(index)

    def update_skip_type_keys(self, keys: Any) -> None:
        self.skipped = keys


def test_micro_batches_come_in_lists_and_the_rest_is_left_out() -> None:
    loader = UpdateLoader(DataLoader(list(range(14)), batch_size=2), 3)  # type: ignore[arg-type]
    assert len(loader) == 2
    assert [[batch.tolist() for batch in update] for update in loader] == [
        [[0, 1], [2, 3], [4, 5]],
        [[6, 7], [8, 9], [10, 11]],
    ]


class Loading:
    """A loader with workers: it says what was taken from it."""

    num_workers, batch_sampler = 2, None

    def __init__(self, length: int) -> None:
        self.length, self.taken = length, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        for item in range(self.length):
            self.taken += 1
            yield item


def test_where_workers_load_an_update_begins_with_its_first_micro_batch() -> None:
    inner = Loading(8)
    updates = iter(UpdateLoader(inner, 3))
    first = next(updates)
    assert inner.taken == 1 and len(first) == 3  # type: ignore[arg-type]
    assert [(item, inner.taken) for item in first] == [(0, 1), (1, 2), (2, 3)]
    assert list(first) == [0, 1, 2] and inner.taken == 3, "taken again, they are the same"
    second = next(updates)
    assert next(iter(second)) == 3 and inner.taken == 4
    assert next(updates, None) is None and inner.taken == 8, (
        "what was not asked for, and what fills no update, is passed by"
    )
    assert [list(update) for update in UpdateLoader(inner, 3)] == [[0, 1, 2], [3, 4, 5]]


def test_the_loader_has_every_setting_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """As mmdet's own trainer gives them to build_dataloader."""
    monkeypatch.setattr(data, "_built", lambda _: Numbers(16))
    cfg = read_config(None)
    asked = {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 5, "pin_memory": True}
    cfg.data.train_dataloader = {"workers_per_gpu": 2, **{k: v for k, v in asked.items() if k != "num_workers"}}
    cfg.seed = 0
    (loader,) = data.phase_loaders(cfg, Batch(8, 4, 2, 1))
    assert {key: getattr(loader.loader, key) for key in asked} == asked
    assert loader.batch_size == 4 and len(loader) == 2


def test_a_hook_that_resets_the_workers_reaches_the_loader() -> None:
    """YOLOXModeSwitchHook writes _iterator and _DataLoader__initialized; on the wrapper they would change nothing."""
    inner = DataLoader(Numbers(8), num_workers=1, persistent_workers=True)  # type: ignore[arg-type]
    loader = UpdateLoader(inner, 2)
    assert len(list(loader)) == 4
    before = inner._iterator

    class Runner:
        epoch, max_epochs = 0, 2
        data_loader = loader
        model = type("Model", (), {"bbox_head": type("Head", (), {"use_l1": False})})
        logger = type("Logger", (), {"info": lambda *_: None})()

    YOLOXModeSwitchHook(num_last_epochs=1).before_train_epoch(Runner())
    assert inner._iterator is None and inner.dataset.skipped is not None  # type: ignore[attr-defined]
    assert len(list(loader)) == 4
    assert inner._iterator is not before
    assert set(vars(loader)) == {"loader", "accumulation"}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("updates", [1, 2, 7])
def test_data_without_end_are_passed_by_unread(shuffle: bool, updates: int, workers: int) -> None:
    """Both of mmdet's endless samplers; the grouped one holds back a batch that it has given."""

    def made() -> UpdateLoader:
        inner = build_dataloader(
            Numbers(12),
            2,
            workers,
            dist=False,
            shuffle=shuffle,
            seed=5,
            runner_type="IterBasedRunner",
            pin_memory=False,
        )
        return UpdateLoader(inner, 2)

    whole = list(islice(iter(made()), updates + 3))
    loader = made()
    loader.pass_by(updates)
    rest = list(islice(iter(loader), 3))
    assert [[batch.tolist() for batch in update] for update in rest] == [
        [batch.tolist() for batch in update] for update in whole[updates:]
    ]


def test_images_are_compared_with_the_global_batch() -> None:
    batch = Batch(train=16, micro=4, accumulation=2, ranks=2)
    check_size(16, batch)
    with pytest.raises(
        ConfigError, match=r"15 images, fewer than one global batch: batch 16 = 4 images .* x 2 .* x 2 ranks"
    ):
        check_size(15, batch)


def test_a_val_phase_finds_the_training_pipeline_within_wrappers() -> None:
    cfg = read_config(None)
    pipeline = cfg.data.train.pipeline
    cfg.data.train = [
        {"type": "RepeatDataset", "times": 2, "dataset": {"type": "ConcatDataset", "datasets": [cfg.data.train]}}
    ]
    assert _validated_as_trained(cfg).pipeline == pipeline
    assert cfg.data.val.pipeline != pipeline
    cfg.data = ConfigDict(
        cfg.data, val=[cfg.data.val, ConfigDict(type="ConcatDataset", datasets=[copy.deepcopy(cfg.data.val)])]
    )
    first, second = _validated_as_trained(cfg)
    assert first.pipeline == second.datasets[0].pipeline == pipeline


def test_sets_that_mmdet_cannot_evaluate_together_are_refused(tmp_path: Path) -> None:
    """Its NotImplementedError once ended a run with a traceback."""
    cfg = read_config(None)
    one = {**cfg.data.val, "ann_file": str(coco.write(tmp_path) / "val.json"), "classes": coco.CLASSES}
    cfg.data.val = {"type": "ConcatDataset", "datasets": [one, one], "separate_eval": False}
    with pytest.raises(ConfigError, match="data: cannot be built: NotImplementedError: Evaluating concatenated"):
        data.test_loader(cfg)


def test_a_loader_to_evaluate_by_may_name_what_mmdet_sets_and_not_change_the_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(data, "build_dataloader", lambda _, **options: asked.append(options))
    monkeypatch.setattr(data, "_built", lambda *_: None)
    cfg = read_config(None, {"data.val_dataloader": {"shuffle": False, "samples_per_gpu": 1, "dist": False}})
    data.test_loader(cfg)
    assert asked[0]["shuffle"] is False and asked[0]["dist"] is True
    cfg = read_config(None, {"data.test_dataloader": {"shuffle": True}})
    with pytest.raises(ConfigError, match=r"data.test_dataloader.shuffle = True"):
        data.test_loader(cfg, "test")
