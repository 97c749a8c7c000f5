"""The data sets that a config names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmdet.datasets import DATASETS


def data_sets(node: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
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
