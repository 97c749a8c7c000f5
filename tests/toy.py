"""A toy model with the shape of a detector, and deterministic micro-batches: every awkward case in a few parameters."""

from __future__ import annotations

import torch
from torch import nn

WIDTH, FEATURES = 12, 6


class Toy(nn.Module):
    """forward(x, y) -> mean loss. x, y: (rows, 6).

    ``rpn_head`` is used twice in one forward; ``temperature`` is outside every named module; ``aux_head`` gets no gradient;
    ``frozen`` is not trained; the sizes do not divide by 2, 3 or 4 ranks.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.neck = nn.Linear(WIDTH, WIDTH, bias=False)
        self.rpn_head = nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, 2))
        self.roi_head = nn.Module()
        self.roi_head.bbox_head = nn.Linear(WIDTH, 3)
        self.aux_head = nn.Linear(WIDTH, 1)
        self.frozen = nn.Linear(FEATURES, FEATURES)
        self.frozen.requires_grad_(False)
        self.temperature = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, y = x.to(self.temperature), y.to(self.temperature)
        h = torch.tanh(self.neck(self.backbone(self.frozen(x))))
        r = self.rpn_head(h)
        b = self.roi_head.bbox_head(h) * self.temperature
        loss = ((r - y[:, :2]) ** 2).mean() + 0.3 * (b - y[:, 2:5]).abs().mean() + 0.1 * (b**2).mean()
        return loss + 0.2 * (self.rpn_head(h * 0.5) ** 2).mean()


def rounded(model: Toy) -> Toy:
    """The model with weights that bf16 can hold, so that a bf16 run starts where its reference does."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().to(parameter.dtype)
    return model


MODULES = ["backbone", "neck", "rpn_head", "roi_head"]
"""Named modules; what is left (``aux_head``, ``temperature``) is in ``rest``."""

MODULES_WITH_AUX = [*MODULES, "aux_head"]


def micro_batch(t: int, k: int, rows: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Micro-batch k of update t."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + 10_007 * t + k)
    x = torch.randn(rows, FEATURES, generator=generator)
    weight = torch.linspace(-1, 1, FEATURES * FEATURES).reshape(FEATURES, FEATURES)
    return x, torch.sin(x @ weight) + 0.7 * torch.randn(rows, FEATURES, generator=generator)
