"""The data sets that a config names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmdet.datasets import DATASETS, CocoPanopticDataset, coco_panoptic


def data_sets(node: Any, where: str) -> Iterator[tuple[str, Any]]:
    """(keys, config) of each data set within wrappers (repeat, concat)."""
    if isinstance(node, (list, tuple)):
        for index, item in enumerate(node):
            yield from data_sets(item, f"{where}[{index}]")
    elif isinstance(node, Mapping):
        inner = [key for key in ("dataset", "datasets") if key in node]
        for key in inner:
            yield from data_sets(node[key], f"{where}.{key}")
        if not inner:
            yield where, node


def kind_of(node: Mapping[str, Any]) -> Any:
    """The class of a data set; None for one that mmdet does not know."""
    named = node.get("type")
    return DATASETS.get(named) if isinstance(named, str) else named


def missing_packages(node: Mapping[str, Any], where: str) -> Iterator[str]:
    """What mmdet imports only if it is there, and without which the data set cannot be read or evaluated."""
    kind = kind_of(node)
    if isinstance(kind, type) and issubclass(kind, CocoPanopticDataset) and coco_panoptic.panopticapi is None:
        yield (
            f"{where}: mmdet reads and evaluates a {kind.__name__} with panopticapi, which is not installed: "
            "pip install git+https://github.com/cocodataset/panopticapi.git"
        )
