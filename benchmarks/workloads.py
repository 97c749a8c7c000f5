"""What is trained in a benchmark: the demo's detector on its own data, and a large detector's parameters with no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from mmcv.parallel import collate
from mmdet.datasets import build_dataset
from mmdet.models import build_detector
from torch import nn
from torch.autograd.function import once_differentiable

from agvm_ds.demo.data import ensure
from agvm_ds.groups import PARAMS, cut_groups
from agvm_ds.mmdet.configs import detector_of, read_config
from agvm_ds.mmdet.detector.model import to_device
from agvm_ds.mmdet.detector.modules import modules_of
from agvm_ds.mmdet.detector.precision import enable_half
from tests.engines import started

SEED = 0


@dataclass(frozen=True)
class Workload:
    """A model, the names of its modules, and what one micro-batch of a rank is: its loss, from an engine."""

    model: Callable[[], nn.Module]
    modules: list[str]
    micro_batch: int
    loss: Callable[[Any, int], torch.Tensor]
    """(engine, number of the micro-batch) -> loss. The same number gives the same images and random choices."""
    half: str | None = None
    """The half precision that the model computes in: a block of the DeepSpeed configuration."""


def demo(batches: int = 8) -> Workload:
    """The demo's Faster R-CNN on its training images: forward, losses and backward as in training, data read beforehand."""
    cfg = read_config(None)
    ensure(cfg.data_root)
    micro = int(cfg.data.train_dataloader.samples_per_gpu)
    images, rank, ranks = build_dataset(cfg.data.train), _rank(), _ranks()
    numbered = [[images[(k * ranks + rank) * micro + i] for i in range(micro)] for k in range(batches)]
    data = [to_device(collate(samples, samples_per_gpu=micro), "cpu") for samples in numbered]

    def loss(engine: Any, number: int) -> torch.Tensor:
        torch.manual_seed(number)  # RoI and anchor sampling
        return engine.module._parse_losses(engine(return_loss=True, **data[number % batches]))[0]

    def model() -> nn.Module:
        torch.manual_seed(SEED)
        return build_detector(cfg.model)

    return Workload(model, modules_of(model()), micro, loss)


OBJECTS = 10
"""Of an image that is made up."""


def random_images(
    config: str, half: str | None = None, micro: int = 4, size: tuple[int, int] = (800, 1344)
) -> Workload:
    """An mmdet config's detector on random images of a size (height, width) with random boxes: all that a GPU has to do.

    half: "fp16", if DeepSpeed is to cast the weights. No masks.
    """
    cfg = read_config(config)
    device = get_accelerator().current_device_name()
    torch.manual_seed(SEED + 1000 * _rank())
    height, width = size
    corners = torch.rand(micro, OBJECTS, 2) * torch.tensor([width - 64.0, height - 64.0])
    boxes = torch.cat([corners, corners + 32 + 32 * torch.rand(micro, OBJECTS, 2)], -1)
    shape = {"img_shape": (*size, 3), "ori_shape": (*size, 3), "pad_shape": (*size, 3), "batch_input_shape": size}
    meta = {**shape, "scale_factor": [1.0] * 4, "flip": False, "filename": "", "ori_filename": ""}
    data = {
        "img": torch.randn(micro, 3, *size, device=device),
        "img_metas": [meta] * micro,
        "gt_bboxes": list(boxes.to(device)),
        "gt_labels": [torch.randint(0, 80, (OBJECTS,), device=device) for _ in range(micro)],
    }

    def loss(engine: Any, number: int) -> torch.Tensor:
        torch.manual_seed(number)
        return engine.module._parse_losses(engine(return_loss=True, **data))[0]

    def model() -> nn.Module:
        torch.manual_seed(SEED)
        detector = detector_of(cfg)
        if half is not None:
            enable_half(detector, half)
        return detector

    return Workload(model, modules_of(model()), micro, loss, half)


def parameters_of(config: str | None) -> Workload:
    """The trainable parameters of an mmdet config (None: the demo's), each with a random gradient and next to no computation.

    The worst case for statistics: an update is memory traffic and communication, nothing else. Gradients come in the
    reverse order of definition, one copy of a block of noise each.
    """
    detector = build_detector(read_config(config).model)
    modules = modules_of(detector)

    def model() -> nn.Module:
        return Untouched(detector)

    def loss(engine: Any, number: int) -> torch.Tensor:
        return engine(torch.ones((), requires_grad=True) * (1 + number % 7))

    return Workload(model, modules, 1, loss)


class Untouched(nn.Module):
    """The module tree of a model, with its trainable parameters; forward passes a number through all leaves."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, Untouched(child))
        for name, p in model.named_parameters(recurse=False):
            if p.requires_grad:
                self.register_parameter(name, nn.Parameter(p.detach().clone()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = list(self.parameters(recurse=False))
        if own:
            x = _Noise.apply(x, *own)
        for child in self.children():
            x = child(x)
        return x


class _Noise(torch.autograd.Function):
    """The number itself; each parameter's gradient is noise of its shape times the gradient of the number."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.shapes = [p.shape for p in parameters]
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradient, *(_noise(shape.numel()).view(shape) * gradient for shape in ctx.shapes)


_BLOCKS: dict[int, torch.Tensor] = {}


def _noise(elements: int) -> torch.Tensor:
    """The same noise for tensors of one size, another in each rank."""
    if elements not in _BLOCKS:
        generator = torch.Generator().manual_seed(SEED + 1000 * _rank() + elements % 1000)
        _BLOCKS[elements] = torch.randn(elements, generator=generator) * 1e-3
    return _BLOCKS[elements]


@contextmanager
def engine_of(work: Workload, config: Mapping[str, Any], cut: bool = False) -> Iterator[Any]:
    """An engine over a fresh model. cut: into AGVM's parameter groups, with AGVM off too; else plain DeepSpeed has one."""
    model = work.model()
    groups = cut_groups([{PARAMS: list(model.parameters())}], model, work.modules) if cut else None
    with started(config, model, model_parameters=groups) as engine:
        yield engine


def update(engine: Any, work: Workload, t: int) -> None:
    """One update of the global batch."""
    accumulation = int(engine.gradient_accumulation_steps())
    for k in range(accumulation):
        engine.backward(work.loss(engine, t * accumulation + k))
        engine.step()


def ds_config(work: Workload, stage: int, base: str, agvm: Mapping[str, Any] | None, **more: Any) -> dict[str, Any]:
    """A DeepSpeed configuration, torch's optimizer in it on a CPU; ``agvm``: its block, None for plain DeepSpeed."""
    adam = {"lr": 1e-4, "torch_adam": get_accelerator().device_name() == "cpu"}
    params: dict[str, Any] = adam if base == "AdamW" else {"lr": 1e-3, "momentum": 0.9}
    config = {
        "train_micro_batch_size_per_gpu": work.micro_batch,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": base, "params": params},
        "zero_optimization": {"stage": stage},
        **more,
    }
    return config if agvm is None else config | {"agvm": {"modules": work.modules, **agvm}}


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _ranks() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
