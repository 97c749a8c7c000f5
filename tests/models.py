"""Toy models with what a detector may have beside plain layers: one awkward case each."""

from __future__ import annotations

from collections.abc import Callable

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.toy import WIDTH, Toy


class Tied(Toy):
    """The auxiliary head's weight is the bounding-box head's: it belongs to the module that comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.aux_head = nn.Linear(WIDTH, 3)
        self.aux_head.weight = self.roi_head.bbox_head.weight

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (
            super().forward(x, y)
            + 0.1 * (self.aux_head(self.backbone(self.frozen(x.to(self.temperature)))) ** 2).mean()
        )


class Transposed(Toy):
    """A weight that is used transposed: its gradient's elements are not in order in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.neck = TransposedLinear(WIDTH)


class TransposedLinear(nn.Module):
    """x W instead of x W^T."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.t())


class ChannelsLast(Toy):
    """A weight that is itself not in order in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.neck.weight.data = self.neck.weight.data.t().contiguous().t()


class Scalar(Toy):
    """A parameter without dimensions, as mmcv's Scale has one."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.0))


class Sometimes(Toy):
    """The auxiliary head has a gradient only where a micro-batch has something for it: on some ranks, in some steps."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = super().forward(x, y)
        if x[0, 0] < 0:
            return loss
        return loss + (self.aux_head(self.backbone(self.frozen(x.to(loss)))) ** 2).mean()


class Early(Toy):
    """The auxiliary head is used while ``early`` is true."""

    early = True

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = super().forward(x, y)
        if not self.early:
            return loss
        return loss + (self.aux_head(torch.tanh(self.neck(self.backbone(self.frozen(x.to(loss)))))) ** 2).mean()


class Zero(Toy):
    """The auxiliary head's gradient is there and exactly zero, as a mask head's without a positive box."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = super().forward(x, y)
        return loss + 0.0 * self.aux_head(self.backbone(self.frozen(x.to(loss)))).sum()


Segment = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def _reentrant(module: nn.Module, h: torch.Tensor) -> torch.Tensor:
    return checkpoint(module, h, use_reentrant=True)


def _saved_tensors(module: nn.Module, h: torch.Tensor) -> torch.Tensor:
    return checkpoint(module, h, use_reentrant=False)


def _deepspeed(module: nn.Module, h: torch.Tensor) -> torch.Tensor:
    # The reference is on a CPU, beside a GPU too, to which DeepSpeed would move it.
    if h.device.type != get_accelerator().device_name():
        return module(h)
    return deepspeed.checkpointing.checkpoint(module, h)


SEGMENTS: dict[str, Segment] = {"reentrant": _reentrant, "saved tensors": _saved_tensors, "deepspeed": _deepspeed}


class Checkpointed(Toy):
    """The backbone's second half and the neck are computed again in the backward."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        run = SEGMENTS[self.kind]
        x, y = x.to(self.temperature), y.to(self.temperature)
        h = self.backbone[1](self.backbone[0](self.frozen(x)))
        h = torch.tanh(run(self.neck, run(self.backbone[2:], h)))
        r = self.rpn_head(h)
        b = self.roi_head.bbox_head(h) * self.temperature
        loss = ((r - y[:, :2]) ** 2).mean() + 0.3 * (b - y[:, 2:5]).abs().mean() + 0.1 * (b**2).mean()
        return loss + 0.2 * (self.rpn_head(h * 0.5) ** 2).mean()


class UsedTwice(Checkpointed):
    """One module in two reentrant checkpoints of a forward: it gets two gradients in one backward."""

    def __init__(self) -> None:
        super().__init__("reentrant")

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.backbone(self.frozen(x.to(self.temperature)))
        again = _reentrant(self.rpn_head, h) + _reentrant(self.rpn_head, 0.5 * h)
        return super().forward(x, y) + (again**2).mean()


def reentrant() -> Toy:
    """mmdet's ``with_cp``."""
    return Checkpointed("reentrant")


def saved_tensors() -> Toy:
    """``use_reentrant=False``."""
    return Checkpointed("saved tensors")


def deepspeed_checkpointing() -> Toy:
    """``deepspeed.checkpointing``."""
    return Checkpointed("deepspeed")
