"""Data sets and loaders of a run."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import Any

from mmcv import Config
from mmdet.datasets import build_dataloader, build_dataset, replace_ImageToTensor
from mmdet.datasets.samplers import InfiniteBatchSampler, InfiniteGroupBatchSampler

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.checks.images import name_images
from agvm_ds.mmdet.configs import blamed
from agvm_ds.mmdet.data_sets import data_sets
from agvm_ds.mmdet.plan import Batch


class MicroBatches:
    """This rank's part of one update: each is taken from a loader when it is first asked for, and kept.

    Data workers load on meanwhile; they would wait for an update whose micro-batches are all taken before it.
    """

    def __init__(self, items: Iterator[Any], length: int) -> None:
        self._items, self._length = items, length
        self._taken = [next(items)]

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        for index in range(self._length):
            if index == len(self._taken):
                self._taken.append(next(self._items))
            yield self._taken[index]


class UpdateLoader:
    """A loader of micro-batches, ``accumulation`` at once: one item is this rank's part of one update.

    Micro-batches that do not fill an update are left out of the epoch. Every other attribute is the loader's own, to read and
    to write (mmdet's YOLOXModeSwitchHook resets its workers so).
    """

    loader: Any
    accumulation: int

    def __init__(self, loader: Any, accumulation: int) -> None:
        vars(self).update(loader=loader, accumulation=accumulation)

    def __len__(self) -> int:
        return len(self.loader) // self.accumulation

    def __iter__(self) -> Iterator[Iterable[Any]]:
        # The loader's iterator, made at once, draws a random number: not only when its first item is asked for.
        items = iter(self.loader)
        # Without workers this process draws the data's random numbers, which an update taken again must not draw anew.
        return self._as_asked_for(items) if self.loader.num_workers else _lists(items, self.accumulation)

    def _as_asked_for(self, items: Iterator[Any]) -> Iterator[MicroBatches]:
        endless = isinstance(self.loader.batch_sampler, (InfiniteBatchSampler, InfiniteGroupBatchSampler))
        for _ in count() if endless else range(len(self)):
            update = MicroBatches(items, self.accumulation)
            yield update
            for _ in update:  # what was not asked for
                pass
        for _ in items:  # what does not fill an update
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.loader, name, value)

    def pass_by(self, updates: int) -> None:
        """Leave out the data of ``updates`` updates, unread, where mmdet's sampler has no end (IterBasedRunner)."""
        sampler = self.loader.batch_sampler
        for _ in islice(iter(sampler), updates * self.accumulation):
            pass
        # InfiniteGroupBatchSampler empties a batch that it gave only when it is asked for the next one.
        for batch in getattr(sampler, "buffer_per_group", {}).values():
            if len(batch) == sampler.batch_size:
                batch.clear()


def _lists(items: Iterator[Any], length: int) -> Iterator[list[Any]]:
    while len(found := list(islice(items, length))) == length:
        yield found


def phase_loaders(cfg: Config, batch: Batch) -> list[UpdateLoader]:
    """One loader a phase of ``cfg.workflow``: lists of micro-batches to train on, single ones to validate on."""
    loaders = {}
    for phase in dict.fromkeys(phase for phase, _ in cfg.workflow):
        data = _built(cfg.data.train if phase == "train" else _validated_as_trained(cfg))
        if phase == "train":
            check_size(len(data), batch)
        defaults = {"workers_per_gpu": 2, "persistent_workers": False, "seed": cfg.seed, "runner_type": cfg.runner.type}
        options = {**defaults, **cfg.data.train_dataloader, "samples_per_gpu": batch.micro, "dist": True}
        loaders[phase] = UpdateLoader(build_dataloader(data, **options), batch.accumulation if phase == "train" else 1)
    return [loaders[phase] for phase, _ in cfg.workflow]


def _built(data_cfg: Any, defaults: dict[str, Any] | None = None) -> Any:
    with blamed("data"):
        return name_images(build_dataset(data_cfg, defaults))


def _validated_as_trained(cfg: Config) -> Any:
    """``data.val`` with the training pipeline: a phase "val" computes losses."""
    validation = copy.deepcopy(cfg.data.val)
    for _, part in data_sets(validation, "data.val"):
        part.pipeline = _pipeline_of(cfg.data.train)
    return validation


def _pipeline_of(node: Any) -> Any:
    """The (first) pipeline of a data set config, wrappers (repeat, concat) included."""
    if isinstance(node, (list, tuple)):
        return _pipeline_of(node[0])
    return node["pipeline"] if "pipeline" in node else _pipeline_of(node.get("dataset") or node["datasets"])


def check_size(images: int, batch: Batch) -> None:
    """Raise ConfigError for a training set that does not fill one global batch."""
    if images < batch.train:
        raise ConfigError(
            f"the training set has {images} images, fewer than one global batch: {batch}; use a smaller "
            "train_batch_size, or more data"
        )


def test_loader(cfg: Config, split: str = "val") -> Any:
    """The loader of ``cfg.data.val`` or ``.test``: each rank sees its share of the images, in order."""
    options = {"samples_per_gpu": 1, "workers_per_gpu": 2, "persistent_workers": False, "shuffle": False}
    options |= dict(cfg.data.get(f"{split}_dataloader", {})) | {"dist": True}
    if options["shuffle"]:
        raise ConfigError(f"data.{split}_dataloader.shuffle = True: results are put together in the data set's order")
    data_cfg = cfg.data[split]
    if options["samples_per_gpu"] > 1:
        for _, part in data_sets(data_cfg, split):
            part.pipeline = replace_ImageToTensor(part.pipeline)
    data = _built(data_cfg, {"test_mode": True})
    return build_dataloader(data, **options)
