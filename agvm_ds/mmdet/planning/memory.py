"""What a rank's training of a detector needs in GPU memory, estimated on any machine, without a GPU.

Bytes in fp32, P parameters of which T are trained, m states of the optimizer for each, N ranks:

| stage | weights | gradients | master copy and optimizer states |
|---|---|---|---|
| 0 | 4 P | 4 T | 4 m T |
| 1 | 4 P | 4 T + 4 T / N | 4 (1 + m) T / N |
| 2 | 4 P | 4 T / N | 4 (1 + m) T / N |
| 3 | 4 P / N + 4 x the largest layer | 4 T / N | 4 (1 + m) T / N |

as ZeRO's paper counts them (arXiv 1910.02054, section 3), and as DeepSpeed 0.19.8 holds them. DeepSpeed's own estimators
are for 16-bit training with Adam; where there is one (stages 2 and 3), the larger counts. Stages 1 to 3 also hold a buffer of
``reduce_bucket_size`` elements, which DeepSpeed's estimators leave out.

Activations are what backbone, neck and dense head save for the backward pass, counted on the meta device for the largest
image of the training pipeline. Losses, RoI heads, work space and fragmentation are not in it: HEADROOM stands for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs, model_to_params
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from mmcv import Config
from torch import nn

from agvm_ds.bases import preconditioned
from agvm_ds.config import AGVMConfig
from agvm_ds.mmdet.configs import detector_of

GIB = 2**30
FP32 = 4
REDUCE_BUCKET = 500_000_000
"""Elements; DeepSpeed's default."""
HEADROOM = 2.5
"""Times the saved activations: in nine of ten of mmdet's configs with a published training memory that is enough
(``python -m benchmarks.zoo_memory``)."""
IMAGES = 2
"""Passed at once when activations are counted: BatchNorm refuses one value a channel."""
DENSE_HEADS = ("rpn_head", "bbox_head", "mask_head")


@dataclass(frozen=True)
class Footprint:
    """A detector's sizes. ``saved``: bytes of activations an image, None where ``note`` says why it is not known."""

    parameters: int
    trainable: int
    largest_layer: int
    saved: int | None
    note: str


@dataclass(frozen=True)
class Needs:
    """Bytes on one rank, beside activations."""

    states: int
    deepspeed: int | None
    """DeepSpeed's own estimate of the states."""
    bucket: int
    agvm: int

    @property
    def total(self) -> int:
        """With the larger estimate of the states."""
        return max(self.states, self.deepspeed or 0) + self.bucket + self.agvm


def footprint(cfg: Config) -> Footprint:
    """Build the detector of a config, without weights, and count. Raises ConfigError when it cannot be built."""
    detector = detector_of(cfg)
    parameters, largest = model_to_params(detector)
    trainable = sum(p.numel() for p in detector.parameters() if p.requires_grad)
    return Footprint(parameters, trainable, largest, *saved_for_backward(detector.to("meta"), image_size(cfg)))


def needs(sizes: Footprint, stage: int, nodes: int, gpus: int, moments: int, elementwise: bool) -> Needs:
    """What a rank holds in a ZeRO stage.

    moments: see ``moments_of``. elementwise: AGVM reduces an elementwise quantity in a measured update (split, or
    preconditioned): one bucket and one gradient shard (``python -m benchmarks.memory``); else nothing.
    """
    ranks, weights, trained = nodes * gpus, FP32 * sizes.parameters, FP32 * sizes.trainable
    shard = trained / ranks
    states = {
        0: weights + trained * (1 + moments),
        1: weights + trained + shard * (2 + moments),
        2: weights + shard * (2 + moments),
        3: weights / ranks + FP32 * sizes.largest_layer + shard * (2 + moments),
    }[stage]
    buffer = REDUCE_BUCKET * FP32 if stage else 0
    bucket = min(AGVMConfig().reduce_bucket_size, sizes.trainable)
    agvm = bucket * FP32 + shard if elementwise else 0
    return Needs(int(states), _estimate(sizes, stage, nodes, gpus), buffer, int(agvm))


def _estimate(sizes: Footprint, stage: int, nodes: int, gpus: int) -> int | None:
    if stage == 2:
        return int(estimate_zero2_model_states_mem_needs(sizes.parameters, gpus, nodes, cpu_offload=False)[1])
    if stage == 3:
        layer = sizes.largest_layer
        return int(estimate_zero3_model_states_mem_needs(sizes.parameters, layer, gpus, nodes, False, False)[1])
    return None


def moments_of(base: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> int:
    """State tensors a parameter that an optimizer keeps: tried out for torch's; 2, the most, for DeepSpeed's own."""
    if preconditioned(base) or not base.__module__.startswith("torch.optim"):
        return 2
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    optimizer = base([parameter], **options)
    optimizer.step()
    state = optimizer.state[parameter].values()
    return sum(isinstance(value, torch.Tensor) and value.shape == parameter.shape for value in state)


def saved_for_backward(detector: Any, size: tuple[int, int] | None) -> tuple[int | None, str]:
    """(bytes an image, what is counted or why nothing is) for a detector on the meta device; size: (height, width).

    A storage that several operations save is counted once, as autograd holds it.
    """
    if size is None:
        return None, "no img_scale in the training pipeline"
    held: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            held[storage._cdata] = storage.nbytes(), tensor
        return tensor

    counted = ["backbone", "neck"]
    detector.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        try:
            features = detector.extract_feat(torch.empty(IMAGES, 3, *size, device="meta"))
        except Exception as error:  # a detector of any kind, whose operations need not know the meta device
            return None, f"the detector does not run on the meta device: {type(error).__name__}: {error}".split("\n")[0]
        counted += [name for name in DENSE_HEADS if _ran(detector, name, features)]
    total = sum(nbytes for nbytes, _ in held.values())
    height, width = size
    return total // IMAGES, f"saved by {', '.join(counted)} for an image of {width} x {height}, on the meta device"


def _ran(detector: nn.Module, name: str, features: Any) -> bool:
    """Whether there is a head of this name, and it runs on features alone."""
    head = getattr(detector, name, None)
    if head is None:
        return False
    try:
        head(features)
    except Exception:  # each kind of head has arguments of its own
        return False
    return True


def image_size(cfg: Config) -> tuple[int, int] | None:
    """(height, width), landscape, of the largest image of the training pipeline, padded; None where none is named."""
    scales = [scale for scale in values_of(cfg.data.train, "img_scale") if len(scale) == 2]
    if not scales:
        return None
    divisor = next(values_of(cfg.data.train, "size_divisor"), None) or 32
    long, short = max((sorted(scale, reverse=True) for scale in scales), key=lambda sides: sides[0] * sides[1])
    return -(-short // divisor) * divisor, -(-long // divisor) * divisor


def values_of(node: Any, key: str) -> Iterator[Any]:
    """Every value of a key in a nested config; of a list of pairs, each pair."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            pairs = name == key and isinstance(value, (list, tuple)) and isinstance(value[0], (list, tuple))
            if name == key:
                yield from value if pairs else [value]
            else:
                yield from values_of(value, key)
    elif isinstance(node, (list, tuple)):
        for item in node:
            yield from values_of(item, key)
