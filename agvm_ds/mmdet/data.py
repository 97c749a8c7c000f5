"""Data sets and loaders of a run, and the checks that come before them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmcv import Config
from mmdet.datasets import build_dataloader, build_dataset, replace_ImageToTensor

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.errors import HostError
from agvm_ds.mmdet.plan import Batch


class UpdateLoader:
    """A loader of micro-batches, read in lists of ``accumulation``: one item is this rank's part of one update.

    Micro-batches that do not fill a list are left out of the epoch. Everything else is the loader's own.
    """

    def __init__(self, loader: Any, accumulation: int) -> None:
        self.loader = loader
        self.accumulation = accumulation

    def __len__(self) -> int:
        return len(self.loader) // self.accumulation

    def __iter__(self) -> Iterator[list[Any]]:
        update: list[Any] = []
        for micro_batch in self.loader:
            update.append(micro_batch)
            if len(update) == self.accumulation:
                yield update
                update = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def train_loaders(cfg: Config, batch: Batch, allow_other_categories: bool) -> list[UpdateLoader]:
    """One loader a phase of ``cfg.workflow``. Raises ConfigError for a data set smaller than one global batch."""
    sets = [build_dataset(cfg.data.train)]
    if len(cfg.workflow) == 2:
        validation = copy.deepcopy(cfg.data.val)
        validation.pipeline = cfg.data.train.get("pipeline") or cfg.data.train.dataset.pipeline
        sets.append(build_dataset(validation))
    for data in sets:
        check_categories(data, allow_other_categories)
    defaults = {"workers_per_gpu": 2, "persistent_workers": False, "seed": cfg.seed, "runner_type": cfg.runner.type}
    options = {**defaults, **cfg.data.train_dataloader, "samples_per_gpu": batch.micro, "dist": True}
    loaders = [UpdateLoader(build_dataloader(data, **options), batch.accumulation) for data in sets]
    if len(loaders[0]) == 0:
        raise ConfigError(
            f"the training set has {len(sets[0])} images, {len(loaders[0].loader)} micro-batches a rank, and an update "
            f"takes {batch.accumulation} ({batch}): not one update an epoch"
        )
    return loaders


def test_loader(cfg: Config, split: str = "val", allow_other_categories: bool = False) -> Any:
    """The loader of ``cfg.data.val`` or ``.test``: each rank sees its share of the images, in order."""
    options = {"samples_per_gpu": 1, "workers_per_gpu": 2, "persistent_workers": False}
    options |= dict(cfg.data.get(f"{split}_dataloader", {}))
    data_cfg = cfg.data[split]
    if options["samples_per_gpu"] > 1:
        data_cfg.pipeline = replace_ImageToTensor(data_cfg.pipeline)
    data = build_dataset(data_cfg, {"test_mode": True})
    check_categories(data, allow_other_categories)
    return build_dataloader(data, **options, dist=True, shuffle=False)


def check_files(cfg: Config) -> None:
    """Raise HostError, all together, for annotation files and image folders of the config that are not on this host."""
    splits = [split for split in ("train", "val", "test") if cfg.data.get(split)]
    missing = [line for split in splits for line in _missing(cfg.data[split], f"data.{split}")]
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
    """Refuse annotations that mmdet would drop in silence: of a category that the file or the classes do not have."""
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
