"""From a recipe for a small batch to one for a large batch: learning rate, warm-up, and AGVM's windows, in updates.

The official AGVM recipes (github.com/Sense-X/AGVM, configs/, of the paper arXiv 2210.11078) are Faster and Mask R-CNN with
ResNet-50 and FPN on COCO at batch 256 and 512. The rules below give back all of their figures but one (``PUBLISHED``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from agvm_ds.config import ConfigError

LINEAR, SQRT, LINEAR_SQRT = "linear", "sqrt", "linear-sqrt"
KNEE = 128
"""Images to which ``linear-sqrt`` is linear: the official rate of batch 256, 0.16 * sqrt(2), is mmdet's 0.02 at batch 16
scaled linearly to 128 (0.16), then by sqrt(256 / 128)."""
RULES = {
    LINEAR: "lr x batch / base (Goyal et al., arXiv 1706.02677)",
    SQRT: "lr x sqrt(batch / base) (Malladi et al., arXiv 2205.10287; betas and eps are left as they are)",
    LINEAR_SQRT: f"linear to {KNEE} images, square root beyond: the official AGVM recipes",
}
"""Name -> what is said of it."""

COCO_IMAGES = 117_266
"""Images of COCO train2017 with an annotation: what mmdet trains on, unless ``filter_empty_gt=False``."""
COCO_ALL_IMAGES = 118_287
PUBLISHED = {
    ("FasterRCNN", 256): 0.16 * 2**0.5,
    ("FasterRCNN", 512): 0.38,
    ("MaskRCNN", 256): 0.16 * 2**0.5,
    ("MaskRCNN", 512): 0.32,
}
"""(detector, batch) -> the official learning rate. ``linear-sqrt`` gives 0.32 at 512 for both detectors."""
PUBLISHED_EPOCHS, PUBLISHED_STEPS = 16, [12, 14]

WARMUP_EPOCHS = 2
MARGIN = 100
"""Updates from the end of the warm-up to AGVM's start, and on both sides of it with clipping."""
WARMUP_RATIO = 0.001
CLIP_NORM = 1.0
EMA_DECAY = 0.97
OFTEN_FROM = 1024
"""Batch from which AGVM measures every 5 updates; every 10 below (AGVM, arXiv 2210.11078)."""


def default_rule(optimizer: str) -> str:
    """``linear-sqrt`` for SGD, whose step is proportional to the gradient; ``sqrt`` for the adaptive ones (Adam, ...)."""
    return LINEAR_SQRT if optimizer in ("SGD", "ASGD") else SQRT


def scaled_rate(rate: float, base: int, batch: int, rule: str) -> float:
    """The learning rate for ``batch`` images, from the ``rate`` of a recipe for ``base`` images.

    With K = KNEE, ``linear-sqrt`` is rate * min(batch, K) / min(base, K) * sqrt(max(batch, K) / max(base, K)).
    rule: a key of RULES.
    """
    if rule == LINEAR:
        return rate * batch / base
    if rule == SQRT:
        return rate * math.sqrt(batch / base)
    linear = min(batch, KNEE) / min(base, KNEE)
    return rate * linear * math.sqrt(max(batch, KNEE) / max(base, KNEE))


@dataclass(frozen=True)
class Windows:
    """When a run warms up, clips and measures; updates, counted from 0."""

    warmup: int
    start_step: int
    clip: tuple[int, int]
    interval: int


def windows(images: int, batch: int) -> Windows:
    """The windows for a training set of ``images``.

    The warm-up is WARMUP_EPOCHS epochs, rounded up to whole intervals of 10 updates; AGVM starts MARGIN updates after it;
    gradients are clipped from MARGIN before its end until AGVM starts.
    """
    warmup = math.ceil(WARMUP_EPOCHS * images / batch / 10) * 10
    start = warmup + MARGIN
    return Windows(warmup, start, (max(warmup - MARGIN, 0), start), 5 if batch >= OFTEN_FROM else 10)


def refuse_late_start(start_step: int, updates: int) -> None:
    """Raise ConfigError when a run of ``updates`` updates ends before AGVM starts."""
    if start_step >= updates:
        raise ConfigError(
            f"AGVM would start at update {start_step}, and the run's last is update {updates - 1}: train for more epochs "
            "(runner.max_epochs or runner.max_iters in --cfg-options), or take a larger --batch"
        )
