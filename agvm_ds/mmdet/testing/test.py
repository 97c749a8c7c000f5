"""Evaluation of a checkpoint over all ranks: a ``.pth``, or a DeepSpeed checkpoint of any ZeRO stage and number of ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from mmcv import Config
from mmdet.utils import get_root_logger, setup_multi_processes
from torch import nn

from agvm_ds.mmdet import data, session
from agvm_ds.mmdet.checks.data_check import check_on_hosts
from agvm_ds.mmdet.configs import read_config
from agvm_ds.mmdet.detector.weights import load_weights, put_weights
from agvm_ds.mmdet.evaluate import broadcast_object, collect, detect, metrics_of, plain_detector
from agvm_ds.mmdet.process.errors import HostError, tell_lost
from agvm_ds.mmdet.process.outputs import make_folder
from agvm_ds.mmdet.process.signals import RankWatch
from agvm_ds.mmdet.progress import counted
from agvm_ds.mmdet.testing.drawing import Drawing
from agvm_ds.mmdet.testing.metrics import evaluation_options, refuse_beyond, wanted_metrics
from agvm_ds.mmdet.testing.result_files import (
    refuse_places,
    refuse_unformatted,
    write_formatted,
    write_json,
    write_pickle,
)
from agvm_ds.mmdet.testing.saved import read_published


@dataclass(frozen=True)
class TestOptions:
    """The command line of ``launch/test.py``."""

    __test__ = False  # not a test class

    config: str
    checkpoint: str
    trust_checkpoint: bool = False
    metrics: tuple[str, ...] = ()
    out: Path | None = None
    json: Path | None = None
    format_only: Path | None = None
    show_dir: Path | None = None
    show_score_thr: float = 0.3
    allow_other_categories: bool = False
    cfg_options: dict[str, Any] = field(default_factory=dict)


def test(options: TestOptions) -> dict[str, float]:
    """Metrics of a checkpoint on ``data.test``, on every rank; none with ``format_only``. Raises ConfigError."""
    session.init_distributed()
    with RankWatch(tell_lost, stops=False).naming_the_dead():
        with session.agreeing():
            cfg = prepare(options)
        return _measure(options, cfg)


test.__test__ = False  # type: ignore[attr-defined]


def prepare(options: TestOptions) -> Config:
    """All that a rank can know to be wrong by itself: checkpoint, config, the places to write to."""
    if "://" not in options.checkpoint and not Path(options.checkpoint).exists():
        raise HostError(f"checkpoint not found: {options.checkpoint}")
    cfg = read_config(options.config, options.cfg_options)
    if options.format_only is not None:
        refuse_unformatted(cfg)
    if os.environ.get("RANK", "0") == "0":
        refuse_places(cfg, options.out, options.json, options.format_only)
    if options.show_dir is not None:
        make_folder("--show-dir", options.show_dir)
    return cfg


def _measure(options: TestOptions, cfg: Config) -> dict[str, float]:
    setup_multi_processes(cfg)
    session.make_demo_data(options.config, cfg)
    metrics = [] if options.format_only else list(options.metrics) or wanted_metrics(cfg)
    check_on_hosts(cfg, ["test"], options.allow_other_categories, metrics)
    device = get_accelerator().current_device_name()
    detector = plain_detector(cfg, device)
    refuse_beyond(detector, metrics)
    load(detector, options)
    loader = data.test_loader(cfg, "test")
    detector.CLASSES = loader.dataset.CLASSES
    show = {}
    if options.show_dir is not None:
        show = {"show": Drawing(options.show_dir, options.show_score_thr, detector, loader.dataset)}
    shown = counted(loader, len(loader), "detection", comm.get_rank())
    results = collect(detect(detector, shown, device, **show), len(loader.dataset))
    found: dict[str, float] = {}
    with session.agreeing():
        if results is not None:
            found = _finish(options, cfg, loader.dataset, results, metrics)
    return dict(broadcast_object(found))


def load(detector: nn.Module, options: TestOptions) -> None:
    """The checkpoint's weights; of a DeepSpeed checkpoint rank 0 reads them, and gives them to the others."""
    place = Path(options.checkpoint)
    if not place.is_dir():
        load_weights(detector, options.checkpoint, get_root_logger(), options.trust_checkpoint, whole=True)
        return
    with session.agreeing():
        if comm.get_rank() == 0:
            put_weights(detector, read_published(place).weights, place)
    for value in detector.state_dict().values():
        comm.broadcast(value, src=0)


def _finish(
    options: TestOptions, cfg: Config, dataset: Any, results: list[Any], metrics: list[str]
) -> dict[str, float]:
    """Rank 0's part: measure and write."""
    logger = get_root_logger()
    if options.out is not None:
        write_pickle(options.out, results)
    found: dict[str, float] = {}
    files: list[Path] = []
    if options.format_only is not None:
        files = write_formatted(options.format_only, dataset, results)
        logger.info("written: %s", ", ".join(map(str, files)))
    else:
        found = metrics_of(dataset, results, evaluation_options(cfg, metrics), logger).numbers
    if options.json is not None:
        about = {"config": options.config, "checkpoint": options.checkpoint, "images": len(results)}
        numbers = {name: value if isfinite(value) else None for name, value in found.items()}
        write_json(options.json, {**about, "metric": numbers, "files": [str(path) for path in files]})
    return found
