"""Evaluation of a published ``.pth`` over all ranks."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from mmcv import Config
from mmdet.utils import get_root_logger, setup_multi_processes

from agvm_ds.mmdet import data, session
from agvm_ds.mmdet.configs import DEMO_CONFIG, config_path, read_config
from agvm_ds.mmdet.data_check import check_on_hosts
from agvm_ds.mmdet.errors import HostError, tell_lost
from agvm_ds.mmdet.evaluate import broadcast_object, collect, detect, metrics_of, plain_detector
from agvm_ds.mmdet.signals import RankWatch
from agvm_ds.mmdet.weights import load_weights


@dataclass(frozen=True)
class TestOptions:
    """The command line of ``launch/test.py``."""

    __test__ = False  # not a test class

    config: str
    checkpoint: str
    trust_checkpoint: bool = False
    out: str | None = None
    metrics: tuple[str, ...] = ()
    allow_other_categories: bool = False
    cfg_options: dict[str, Any] = field(default_factory=dict)


def test(options: TestOptions) -> dict[str, float]:
    """Metrics of a checkpoint on ``data.test``, on every rank. Raises ConfigError for bad input."""
    session.init_distributed()
    with RankWatch(tell_lost, stops=False).naming_the_dead():
        with session.agreeing():
            if "://" not in options.checkpoint and not Path(options.checkpoint).is_file():
                raise HostError(f"checkpoint not found: {options.checkpoint}")
            cfg = read_config(options.config, options.cfg_options)
        return _measure(options, cfg)


def _measure(options: TestOptions, cfg: Config) -> dict[str, float]:
    setup_multi_processes(cfg)
    if config_path(options.config) == DEMO_CONFIG:
        session.make_demo_data(cfg)
    check_on_hosts(cfg, ["test"], options.allow_other_categories, options.metrics)
    device = get_accelerator().current_device_name()
    detector = plain_detector(cfg, device)
    load_weights(detector, options.checkpoint, get_root_logger(), options.trust_checkpoint)
    loader = data.test_loader(cfg, "test")
    results = collect(detect(detector, loader, device), len(loader.dataset))
    metrics: dict[str, float] = {}
    if results is not None:
        if options.out:
            Path(options.out).write_bytes(pickle.dumps(results))
        metric = list(options.metrics) or cfg.get("evaluation", {}).get("metric", "bbox")
        metrics = metrics_of(loader.dataset, results, {"metric": metric}, get_root_logger())
    return dict(broadcast_object(metrics))


test.__test__ = False  # type: ignore[attr-defined]
