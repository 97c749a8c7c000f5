"""Evaluation over all ranks, on whole fp32 weights in a plain detector: the same in every ZeRO stage and precision.

The training model is not used: under ZeRO-3 a rank whose images have no detections skips a head, gathers fewer parameters
than the others, and hangs them; and bfloat16 does not go through mmcv's NMS. What is evaluated is what is published.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch
from deepspeed import comm
from mmcv import Config
from mmdet.core import encode_mask_results
from torch import nn

from agvm_ds.mmdet.configs import detector_of
from agvm_ds.mmdet.detector.model import put_on, to_device
from agvm_ds.mmdet.randomness import untouched_randomness


def plain_detector(cfg: Config, device: torch.device | str) -> nn.Module:
    """A detector of the config without weights, in evaluation mode. Raises ConfigError when it cannot be built."""
    with untouched_randomness():
        detector = detector_of(cfg)
    put_on(detector, device)
    detector.eval()  # mmdet's distillation returns nothing here
    return detector


@torch.no_grad()
def detect(
    detector: nn.Module,
    loader: Any,
    device: torch.device | str,
    show: Callable[[list[Any], list[Any]], None] = lambda metas, results: None,
) -> list[Any]:
    """This rank's share of the results, an entry an image, masks encoded as run lengths.

    show: called with the metas of each batch's images and their results, masks as they are.
    """
    results: list[Any] = []
    for batch in loader:
        inputs = to_device(batch, device)
        found = detector(return_loss=False, rescale=True, **inputs)
        show(inputs["img_metas"][0], found)
        results.extend(_encoded(result) for result in found)
    return results


def _encoded(result: Any) -> Any:
    if isinstance(result, tuple):
        boxes, masks = result
        return boxes, encode_mask_results(masks)
    if isinstance(result, dict) and "ins_results" in result:  # panoptic
        boxes, masks = result["ins_results"]
        return {**result, "ins_results": (boxes, encode_mask_results(masks))}
    return result


@dataclass(frozen=True)
class Packed:
    """A panoptic result's map, a number a pixel, as small as the segments in it: NCCL gathers on rank 0's GPU."""

    shape: tuple[int, ...]
    kind: str
    bytes: bytes

    @classmethod
    def of(cls, numbers: np.ndarray[Any, Any]) -> Packed:
        """Pack."""
        return cls(numbers.shape, numbers.dtype.str, zlib.compress(numbers.tobytes(), 1))

    def unpacked(self) -> np.ndarray[Any, Any]:
        """The map."""
        return np.frombuffer(bytearray(zlib.decompress(self.bytes)), self.kind).reshape(self.shape)


PANOPTIC = "pan_results"
"""mmdet's name of the map in a result."""


def _packed(result: Any) -> Any:
    if isinstance(result, dict) and isinstance(result.get(PANOPTIC), np.ndarray):
        return {**result, PANOPTIC: Packed.of(result[PANOPTIC])}
    return result


def _unpacked(result: Any) -> Any:
    if isinstance(result, dict) and isinstance(result.get(PANOPTIC), Packed):
        return {**result, PANOPTIC: result[PANOPTIC].unpacked()}
    return result


def collect(results: list[Any], images: int) -> list[Any] | None:
    """All results in the data set's order on rank 0, None elsewhere. The sampler deals images out rank by rank in turn."""
    parts: list[Any] | None = [None] * comm.get_world_size() if comm.get_rank() == 0 else None
    torch.distributed.gather_object([_packed(result) for result in results], parts)
    if parts is None:
        return None
    in_order = [_unpacked(result) for turn in zip(*parts, strict=True) for result in turn]
    return in_order[:images]  # the sampler pads the last turn


@dataclass(frozen=True)
class Metrics:
    """What a data set's ``evaluate`` has found."""

    numbers: dict[str, float] = field(default_factory=dict)
    undetected: bool = False
    """Of some metric nothing was detected: it counts as 0, and its other names are not among the numbers."""


def metrics_of(data: Any, results: list[Any], options: Mapping[str, Any], logger: Any) -> Metrics:
    """The data set's own metrics as plain numbers; what is no number (lists by class, ...) is logged alone."""
    with warnings.catch_warnings():
        found = data.evaluate(results, logger=logger, **options)
    numbers = {key: float(value) for key, value in found.items() if _is_number(value)}
    # mmdet adds the figures once more as a text ("bbox_mAP_copypaste")
    for key, value in found.items():
        if key not in numbers and not isinstance(value, str):
            logger.info("%s: %s", key, value)
    wanted, undetected = options.get("metric", []), False
    for metric, prefix in product([wanted] if isinstance(wanted, str) else wanted, _prefixes(data)):
        if metric in ("bbox", "segm") and not any(key.startswith(f"{prefix}{metric}_") for key in numbers):
            numbers[f"{prefix}{metric}_mAP"] = numbers[f"{prefix}{metric}_mAP_50"] = 0.0
            undetected = True
    return Metrics(numbers, undetected)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) or (
        isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 0
    )


def _prefixes(data: Any) -> list[str]:
    """What mmdet puts before the metrics' names: the number of the set where several are evaluated one by one."""
    sets = data.datasets if getattr(data, "separate_eval", False) else None
    return [""] if sets is None else [f"{index}_" for index in range(len(sets))]


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
