"""The data of a run, looked through before it starts: its files, and every COCO annotation file and image list in them.

launch/check_data.py tells everything; launch/train.py and launch/test.py stop at what is refused. Data sets that are not read
as CocoDataset or LVIS read theirs are only looked for.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm
from mmcv import Config
from mmdet.datasets import CocoDataset, LVISV05Dataset, LVISV1Dataset

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.checks.annotations import Use, check_annotations
from agvm_ds.mmdet.checks.findings import Report
from agvm_ds.mmdet.checks.images import Image, check_files
from agvm_ds.mmdet.configs import blamed
from agvm_ds.mmdet.data_sets import data_sets, kind_of, missing_packages
from agvm_ds.mmdet.process.errors import HostError
from agvm_ds.mmdet.testing.metrics import unknown_metrics, wanted_metrics

SPLITS = ("train", "val", "test")
FILES = ("ann_file", "img_prefix", "seg_prefix", "proposal_file")
"""Keys of a data set config that name files or folders, one or a list."""
READERS = {"img_prefix": ("LoadImageFromFile",), "seg_prefix": ("LoadAnnotations", "LoadPanopticAnnotations")}
"""Folder -> the steps of a pipeline that read files in it, from a disk or elsewhere."""
_LVIS = (LVISV05Dataset, LVISV1Dataset)


@dataclass
class Source:
    """One data set of a config: an annotation file and how it is used."""

    where: str
    """Keys of the config."""
    node: Mapping[str, Any]
    file: Path
    folder: str
    """Of its images."""
    use: Use | None
    """None for a kind that is not looked through."""
    report: Report | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for data sets that are looked through alike."""
        return self.file, self.folder, self.use, str(self.loader)

    @property
    def loader(self) -> Mapping[str, Any]:
        """The pipeline's step that reads images."""
        return _step(self.node, READERS["img_prefix"])

    @property
    def images(self) -> list[Image]:
        """Its image files, as far as they are on a disk and named by the annotation file."""
        named = self.report.images if self.report is not None else []
        return [
            Image(os.path.join(self.folder, image["file_name"]), image.get("width") or 0, image.get("height") or 0)
            for image in named
            if isinstance(image.get("file_name"), str) and _on_disk(self.loader)
        ]


@dataclass
class Checked:
    """What was found in the data of a config."""

    sources: list[Source] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What is refused beside single annotation files."""

    @property
    def reports(self) -> list[Report]:
        """Each file once, though several data sets may share it."""
        return list({id(s.report): s.report for s in self.sources if s.report is not None}.values())

    def lines(self, noted: bool = False) -> list[str]:
        """What is refused, or noted, a line each."""
        found = [line for report in self.reports for line in report.lines(noted)]
        return list(dict.fromkeys(found if noted else [*self.problems, *found]))


def check_data(
    cfg: Config, splits: Iterable[str], allow_others: bool = False, metrics: Sequence[str] | None = None
) -> Checked:
    """Look through the data sets of these splits of a config, as a run with these metrics reads them."""
    checked = Checked()
    evaluated = list(metrics or wanted_metrics(cfg))
    for split in splits:
        for where, node in data_sets(cfg.data.get(split), f"data.{split}"):
            try:
                with blamed(where):
                    _check_data_set(checked, node, where, split == "train", evaluated, allow_others)
            except ConfigError as error:
                checked.problems.append(str(error))
    checked.problems += _disagreements(checked.sources)
    return checked


def _check_data_set(
    checked: Checked, node: Mapping[str, Any], where: str, trained: bool, metrics: Sequence[str], allow_others: bool
) -> None:
    """Look through one data set of a config; a file that several share in the same way, once."""
    missing = [*missing_packages(node, where), *_missing(node, where)]
    checked.problems += [*missing, *(() if trained else unknown_metrics(node, metrics))]
    for source in [] if missing else _sources(node, where, trained, metrics, allow_others):
        same = next((known for known in checked.sources if known.key == source.key), None)
        if same is not None:
            source.report = same.report
        elif source.use is not None:
            source.report = check_annotations(source.file, source.use)
            check_files(source.images, source.report)
        checked.sources.append(source)


def check_on_hosts(
    cfg: Config, splits: Iterable[str], allow_others: bool = False, metrics: Sequence[str] | None = None
) -> list[str]:
    """Look through the data of a run, in one rank of each host; return what is worth a note. Every rank must call it.

    Raises HostError, on every rank, when data are not there or not in order on any host.
    """
    found: tuple[str, list[str], list[str]] | None = None
    if os.environ.get("LOCAL_RANK", "0") == "0":
        checked = check_data(cfg, splits, allow_others, metrics)
        found = socket.gethostname(), checked.lines(), checked.lines(noted=True)
    everywhere: list[Any] = [found]
    if comm.is_initialized():
        everywhere = [None] * comm.get_world_size()
        torch.distributed.all_gather_object(everywhere, found)
    bad = {host: refused for host, refused, _ in filter(None, everywhere) if refused}
    own = bad.get(socket.gethostname())
    if own:
        raise HostError("\n  ".join(["the data are not in order (launch/check_data.py tells everything):", *own]))
    if bad:
        raise HostError(f"the data are not in order on {', '.join(bad)}, which tells more")
    return next((noted for _, _, noted in filter(None, everywhere)), [])


def _missing(node: Mapping[str, Any], where: str) -> Iterator[str]:
    """ "where: not found: path" for each missing file of a data set config."""
    for key in FILES if _on_disk(node) else ():
        for path in _paths(node, key) if _on_disk(_step(node, READERS.get(key, ()))) else ():
            if not path.exists():
                yield f"{where}.{key}: not found: {path}"


def _step(node: Mapping[str, Any], kinds: tuple[str, ...]) -> Mapping[str, Any]:
    """The first step of a data set's pipeline whose type begins so; nothing when there is none."""
    steps = node.get("pipeline") or []
    return next((step for step in steps if str(step.get("type")).startswith(kinds)), {})


def _paths(node: Mapping[str, Any], key: str) -> list[Path]:
    values = node.get(key) or []
    return [Path(node.get("data_root") or "") / value for value in ([values] if isinstance(values, str) else values)]


def _on_disk(node: Mapping[str, Any]) -> bool:
    return (node.get("file_client_args") or {}).get("backend", "disk") == "disk"


def _sources(
    node: Mapping[str, Any], where: str, trained: bool, metrics: Sequence[str], allow_others: bool
) -> Iterator[Source]:
    """One for each annotation file of a data set config; of a list, mmdet makes several data sets."""
    files, folders = _paths(node, "ann_file"), [str(path) for path in _paths(node, "img_prefix")] or [""]
    use = _use(node, where, trained, metrics, allow_others) if _on_disk(node) else None
    for index, file in enumerate(files):
        yield Source(where, node, file, folders[min(index, len(folders) - 1)], use)


def _use(node: Mapping[str, Any], where: str, trained: bool, metrics: Sequence[str], allow_others: bool) -> Use | None:
    """How a run uses a data set; None when its annotation file is not read as CocoDataset or LVIS read theirs."""
    kind = kind_of(node)
    reader = getattr(kind, "load_annotations", None)
    lvis = any(reader is known.load_annotations for known in _LVIS)
    if reader is not CocoDataset.load_annotations and not lvis:
        return None
    try:
        classes = tuple(kind.get_classes(node.get("classes")))
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}.classes = {node.get('classes')!r}: {error}; a string names a file of classes, and one class is "
            'written ("name",)'
        ) from error
    masks = any(step.get("with_mask") for step in node.get("pipeline") or []) if trained else "segm" in metrics
    return Use(classes, trained, bool(masks), allow_others, lvis)


def _disagreements(sources: list[Source]) -> list[str]:
    """mmdet numbers labels by each file's own order of categories: files of one run must number alike."""
    problems = []
    first: dict[str, tuple[Path, int]] = {}
    for source in sources:
        for name, label in (source.report.labels if source.report is not None else {}).items():
            file, known = first.setdefault(name, (source.file, label))
            if known != label:
                problems.append(
                    f"{source.file}: category {name!r} would have label {label}, and {known} in {file}: list the categories "
                    "of both in the same order"
                )
                break
    return problems
