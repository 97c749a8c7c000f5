"""What an evaluation leaves on disk: raw results, metrics, and the data set's own result files. Rank 0 writes them."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmcv import Config
from mmdet.datasets import CocoPanopticDataset

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.data_sets import data_sets, kind_of
from agvm_ds.mmdet.process.errors import HostError
from agvm_ds.mmdet.process.outputs import refuse_unwritable, told, written_whole

PICKLES = (".pkl", ".pickle")
PREFIX = "jsonfile_prefix"
"""The argument of ``format_results`` by which mmdet's COCO data sets, LVIS and panoptic ones included, take a prefix."""
PANOPTIC = "panoptic"
"""The folder beside its result files in which a panoptic data set puts images."""


def refuse_places(cfg: Config, out: Path | None, json_file: Path | None, prefix: Path | None) -> None:
    """Raise ConfigError for a file that cannot be written there, or would take the place of a folder."""
    if out is not None and out.suffix not in PICKLES:
        raise ConfigError(f"--out {out}: raw results are a pickle: its name must end in {' or '.join(PICKLES)}")
    for option, path in (("--out", out), ("--json", json_file), ("--format-only", prefix)):
        if path is not None:
            refuse_unwritable(option, path)
    images = prefix and prefix.with_name(PANOPTIC)
    if images and images.exists() and issubclass(kind_of(cfg.data.test), CocoPanopticDataset):
        raise HostError(f"--format-only {prefix}: panoptic images go into {images}, which is there: remove it first")


def refuse_unformatted(cfg: Config) -> None:
    """Raise ConfigError when ``data.test`` is of a kind, or a concatenation, that writes no result files."""
    for where, node in data_sets(cfg.data.test, "data.test"):
        kind = kind_of(node)
        writes = PREFIX in inspect.signature(getattr(kind, "format_results", object)).parameters
        if where != "data.test" or not writes or isinstance(node.get("ann_file"), (list, tuple)):
            raise ConfigError(
                f"--format-only: {where} is {getattr(kind, '__name__', kind)}: only a single COCO, LVIS or panoptic data set "
                "writes result files"
            )


def write_pickle(path: Path, results: list[Any]) -> None:
    """The raw results, in the data set's order. Raises HostError."""
    with told(path), written_whole(path) as file:
        pickle.dump(results, file)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Raises HostError."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with told(path), written_whole(path) as file:
        file.write(text.encode())


def write_formatted(prefix: Path, data: Any, results: list[Any]) -> list[Path]:
    """The data set's own files, ``PREFIX.bbox.json`` and so on, made in a draft folder beside them. Raises HostError."""
    with told(prefix):
        draft = Path(tempfile.mkdtemp(prefix=f".{prefix.name}.", dir=prefix.parent))
        try:
            data.format_results(results, **{PREFIX: str(draft / prefix.name)})
            return list(_moved(sorted(draft.iterdir(), key=Path.is_file), prefix.parent))
        finally:
            shutil.rmtree(draft)


def _moved(made: Iterable[Path], folder: Path) -> Iterator[Path]:
    """Folders (panoptic images) come before the files that speak of them."""
    for path in made:
        final = folder / path.name
        os.replace(path, final)
        yield final
