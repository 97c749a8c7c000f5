"""Data sets and loaders of a run, and the checks that come before them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from mmcv import Config
from mmdet.datasets import build_dataloader, build_dataset, replace_ImageToTensor

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.errors import HostError
from agvm_ds.mmdet.plan import Batch


class UpdateLoader:
    """A loader of micro-batches, read in lists of ``accumulation``: one item is this rank's part of one update.

    Micro-batches that do not fill a list are left out of the epoch. Every other attribute is the loader's own, to read and
    to write (mmdet's YOLOXModeSwitchHook resets its workers so).
    """

    loader: Any
    accumulation: int

    def __init__(self, loader: Any, accumulation: int) -> None:
        vars(self).update(loader=loader, accumulation=accumulation)

    def __len__(self) -> int:
        return len(self.loader) // self.accumulation

    def __iter__(self) -> Iterator[list[Any]]:
        # The loader's iterator, made at once, draws a random number: not only when its first item is asked for.
        return _lists(iter(self.loader), self.accumulation)

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


def phase_loaders(cfg: Config, batch: Batch, allow_other_categories: bool) -> list[UpdateLoader]:
    """One loader a phase of ``cfg.workflow``: lists of micro-batches to train on, single ones to validate on."""
    loaders = {}
    for phase in dict.fromkeys(phase for phase, _ in cfg.workflow):
        data = build_dataset(cfg.data.train if phase == "train" else _validated_as_trained(cfg))
        check_categories(data, allow_other_categories)
        if phase == "train":
            check_size(len(data), batch)
        defaults = {"workers_per_gpu": 2, "persistent_workers": False, "seed": cfg.seed, "runner_type": cfg.runner.type}
        options = {**defaults, **cfg.data.train_dataloader, "samples_per_gpu": batch.micro, "dist": True}
        loaders[phase] = UpdateLoader(build_dataloader(data, **options), batch.accumulation if phase == "train" else 1)
    return [loaders[phase] for phase, _ in cfg.workflow]


def _validated_as_trained(cfg: Config) -> Any:
    """``data.val`` with the training pipeline: a phase "val" computes losses."""
    validation = copy.deepcopy(cfg.data.val)
    validation.pipeline = _pipeline_of(cfg.data.train)
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


def test_loader(cfg: Config, split: str = "val", allow_other_categories: bool = False) -> Any:
    """The loader of ``cfg.data.val`` or ``.test``: each rank sees its share of the images, in order."""
    options = {"samples_per_gpu": 1, "workers_per_gpu": 2, "persistent_workers": False}
    options |= dict(cfg.data.get(f"{split}_dataloader", {}))
    data_cfg = cfg.data[split]
    if options["samples_per_gpu"] > 1:
        for part in data_cfg if isinstance(data_cfg, (list, tuple)) else [data_cfg]:
            part.pipeline = replace_ImageToTensor(part.pipeline)
    data = build_dataset(data_cfg, {"test_mode": True})
    check_categories(data, allow_other_categories)
    return build_dataloader(data, **options, dist=True, shuffle=False)


def check_files(cfg: Config, splits: Iterable[str]) -> None:
    """Raise HostError, all together, for annotation files and image folders of these splits that are not on this host."""
    missing = [line for split in splits for line in _missing(cfg.data.get(split), f"data.{split}")]
    if missing:
        raise HostError("\n  ".join(["the data set is not there:", *dict.fromkeys(missing)]))


def _missing(node: Any, where: str) -> Iterator[str]:
    """ "where: not found: path" for each missing file of one data set config, wrappers (repeat, concat) included."""
    if isinstance(node, (list, tuple)):
        for index, item in enumerate(node):
            yield from _missing(item, f"{where}[{index}]")
    if not isinstance(node, Mapping):
        return
    for key in ("ann_file", "img_prefix", "seg_prefix"):
        values = node.get(key) or []
        for value in [values] if isinstance(values, str) else values:
            path = Path(node.get("data_root") or "") / value
            if not path.exists():
                yield f"{where}.{key}: not found: {path}"
    for key in ("dataset", "datasets"):
        if key in node:
            yield from _missing(node[key], f"{where}.{key}")


def check_categories(data: Any, allow_others: bool) -> None:
    """Refuse annotations that mmdet would drop in silence: of a category that the file or the classes do not have.

    Only data sets that mmdet reads through pycocotools (CocoDataset and its kind) can be checked; others are not.
    """
    for part in getattr(data, "datasets", None) or ([data.dataset] if hasattr(data, "dataset") else []):
        check_categories(part, allow_others)
    coco = getattr(data, "coco", None)
    if coco is None or not hasattr(coco, "cats"):
        return
    names = {key: category["name"] for key, category in coco.cats.items()}
    known = {key for key, name in names.items() if name in data.CLASSES or allow_others}
    bad = [note for note in coco.anns.values() if note["category_id"] not in known]
    if not bad:
        return
    first = bad[0]
    category = names.get(first["category_id"])
    said = (
        f"category {category!r}, which is not in the classes" if category else "a category that the file does not list"
    )
    raise HostError(
        f"{data.ann_file}: {len(bad)} annotations have a category that is not in the classes; the first is annotation "
        f"{first['id']} (category_id {first['category_id']}): {said} {tuple(data.CLASSES)}. Correct the file or "
        "`classes` in the data config"
        + (", or pass --allow-other-categories to leave such annotations out" * bool(category))
    )
