"""The gradient as an Adam sees it: v is the second moment as it stands before the update, elementwise."""

from __future__ import annotations

import torch


def inverse_denominator(v: torch.Tensor, eps: float) -> torch.Tensor:
    """P = 1 / (sqrt(v) + eps); 1 where that is infinite (eps = 0, no gradient seen yet).

    Before the first update v = 0, and P is the same everywhere: of no effect on variance and noise scale, as P = 1.
    """
    return v.sqrt().add_(eps).reciprocal_().nan_to_num_(posinf=1.0)


def official_step(half: torch.Tensor, v: torch.Tensor, n: int, beta2: float, eps: float) -> torch.Tensor:
    """G_A / (sqrt(beta2 v + (1 - beta2) (G_A / n)^2) + eps), 0 where G_A is, without bias correction.

    half: the mean gradient of half a batch, G_A, unscaled; n: micro-batches in the whole one. The n is the official
    implementation's, which preconditions before it rescales.
    """
    denominator = torch.addcmul(beta2 * v, half, half, value=(1 - beta2) / n**2).sqrt_().add_(eps)
    return torch.where(half == 0, 0.0, half / denominator)
