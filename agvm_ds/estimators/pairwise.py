"""The pairwise estimator: the average over all splits of the micro-batches, from two numbers a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from agvm_ds.estimators.base import Estimate, Estimator
from agvm_ds.shards import Shards, square_norm
from agvm_ds.variance import noise_scale, pairwise_variance


class Pairwise(Estimator):
    """Phi from S2 = sum_k |g_k|^2 and G2 = |G|^2 of each module: no gradient-sized communication.

    The micro-gradients appear divided by the number of accumulation steps, which is put back here. A loss scale is a
    common factor of S2 and G2, and of no effect on their ratios.
    """

    def __init__(self, modules: Sequence[str], device: torch.device | str) -> None:
        super().__init__(modules, device)
        self._s2 = self._zeros()

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(len(self.modules), dtype=torch.float64, device=self.device)

    def start(self) -> None:
        self._s2 = self._zeros()

    def observe(self, module: int, gradient: torch.Tensor) -> None:
        self._s2[module] += square_norm(gradient)

    def local_sums(self, shards: Shards) -> torch.Tensor:
        """Shape (2, modules): S2 / accumulation^2 of the local micro-batches, and G2 of the local shards."""
        g2 = self._zeros()
        index = {name: i for i, name in enumerate(self.modules)}
        for module, gradient in shards.gradients():
            g2[index[module]] += square_norm(gradient)
        return torch.stack([self._s2, g2])

    def estimates(self, sums: torch.Tensor, *, ranks: int, accumulation: int, images: int) -> list[Estimate]:
        n = ranks * accumulation
        pairs = [(s2 * accumulation**2, g2) for s2, g2 in zip(*sums.tolist(), strict=True)]
        return [Estimate(pairwise_variance(s2, g2, n), noise_scale(s2, g2, n, images)) for s2, g2 in pairs]
