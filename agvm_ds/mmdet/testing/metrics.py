"""What can be measured: the metrics of each of mmdet's data sets, and what a detector's results have for them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mmcv import Config
from mmdet.core.evaluation.eval_hooks import DistEvalHook
from mmdet.datasets import (
    CityscapesDataset,
    CocoDataset,
    CocoPanopticDataset,
    CustomDataset,
    LVISDataset,
    OpenImagesDataset,
    VOCDataset,
)
from mmdet.models.detectors import RPN, SingleStageDetector, TwoStageDetector
from torch import nn

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.data_sets import kind_of

INSTANCES = ("bbox", "segm", "proposal")
"""Of COCO. mmdet 2.28's proposal_fast fails with numpy 2."""
METRICS: dict[Any, tuple[str, ...]] = {
    CocoDataset.evaluate: INSTANCES,
    CocoPanopticDataset.evaluate: ("PQ", *INSTANCES),
    CityscapesDataset.evaluate: ("cityscapes", *INSTANCES),
    LVISDataset.evaluate: INSTANCES,
    CustomDataset.evaluate: ("mAP", "recall"),
    VOCDataset.evaluate: ("mAP", "recall"),
    OpenImagesDataset.evaluate: ("mAP",),
}
"""By the function that measures, which data sets inherit; one that is not here checks its metrics itself."""
_OF_HOOK = {name for kind in DistEvalHook.__mro__ for name in inspect.signature(kind.__init__).parameters}


def wanted_metrics(cfg: Config) -> list[str]:
    """Those of the config's ``evaluation``."""
    named = (cfg.get("evaluation") or {}).get("metric", ())
    return [named] if isinstance(named, str) else list(named)


def evaluation_options(cfg: Config, metrics: Sequence[str]) -> dict[str, Any]:
    """What the data set's ``evaluate`` is called with: the config's ``evaluation`` but for what its hook takes."""
    options = {key: value for key, value in (cfg.get("evaluation") or {}).items() if key not in _OF_HOOK}
    return {**options, "metric": list(metrics)} if metrics else options


def unknown_metrics(node: Mapping[str, Any], metrics: Iterable[str]) -> Iterator[str]:
    """Metrics of which a data set would say only when everything is computed that it cannot measure them."""
    allowed = METRICS.get(getattr(kind_of(node), "evaluate", object))
    if allowed is None:
        return
    for metric in metrics:
        if metric not in allowed:
            yield f"evaluation metric {metric!r}: not known; allowed: {', '.join(allowed)}"
        elif "PQ" in allowed and metric != "PQ" and not node.get("ins_ann_file"):
            yield f"evaluation metric {metric!r}: needs ins_ann_file, the instances' annotations, in the data config"


def refuse_beyond(detector: nn.Module, metrics: Iterable[str]) -> None:
    """Raise ConfigError for a metric for which the detector's results have nothing."""
    found = results_of(detector)
    for metric in metrics:
        if metric in (*INSTANCES, "PQ") and metric not in found:
            raise ConfigError(
                f"evaluation metric {metric!r}: the results of {type(detector).__name__} do not have it; allowed: "
                f"{', '.join(found)}"
            )


def results_of(detector: nn.Module) -> tuple[str, ...]:
    """What can be measured of a detector's results."""
    if isinstance(detector, RPN):
        return ("proposal",)
    if any(hasattr(detector, name) for name in ("panoptic_head", "panoptic_fusion_head")):
        return ("PQ", *INSTANCES)
    if isinstance(detector, (SingleStageDetector, TwoStageDetector)) and not detector.with_mask:
        return ("bbox", "proposal")
    return INSTANCES
