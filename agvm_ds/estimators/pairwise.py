"""The pairwise estimator: the average over all splits of the micro-batches, from two numbers a module."""

from __future__ import annotations

from collections.abc import Collection

import torch

from agvm_ds.estimators.base import ElementwiseEstimator, Estimate, Estimator
from agvm_ds.estimators.preconditioning import inverse_denominator
from agvm_ds.shards import Piece, Shards
from agvm_ds.variance import noise_and_signal, noise_scale, pairwise_variance


def _estimate(s2: float, g2: float, n: int, shards: Shards) -> Estimate:
    images = int(shards.engine.train_micro_batch_size_per_gpu())
    noise, signal = (value / shards.loss_scale**2 for value in noise_and_signal(s2, g2, n, images))
    return Estimate(pairwise_variance(s2, g2, n), noise_scale(s2, g2, n, images), noise, signal)


class Pairwise(Estimator):
    """Phi from S2 = sum_k |g_k|^2 and G2 = |G|^2 of each module: no gradient-sized communication.

    A loss scale is a common factor of S2 and G2, and of no effect on their ratios.
    """

    def start(self) -> None:
        self._s2 = self.square_norms()

    def observe(self, index: int, gradient: torch.Tensor) -> None:
        self._s2.of(self._module[index], gradient)

    def end_micro_batch(self) -> None:
        self._s2.total()

    def local_sums(self, absent: Collection[int] = ()) -> torch.Tensor:
        """Shape (2, modules): S2 / accumulation^2 of the local micro-batches, and G2 of the local shards."""
        g2 = self.square_norms()
        for piece in self.shards.pieces(absent):
            g2.of(self._index[piece.module], piece.gradient)
        return torch.cat([self._s2.total(), g2.total()])

    def estimates(self, sums: torch.Tensor) -> list[Estimate]:
        pairs = zip(*sums.tolist(), strict=True)
        return [_estimate(s2 * self.shards.accumulation**2, g2, self.n, self.shards) for s2, g2 in pairs]

    def squares(self, sums: torch.Tensor) -> torch.Tensor:
        return sums


class PreconditionedPairwise(ElementwiseEstimator):
    """The same of P g_k and P G, with P = 1 / (sqrt(v) + eps): needs Q = sum_k g_k^2, elementwise, at the owners of v."""

    rows = 2

    def contribute(self, slot: torch.Tensor, gradient: torch.Tensor) -> None:
        slot.addcmul_(gradient, gradient, value=self.shards.accumulation**2)

    def sums_of(self, piece: Piece) -> torch.Tensor:
        group = self.shards.optimizer.param_groups[piece.group]
        weight = inverse_denominator(self.shards.second_moment(piece).double(), group["eps"]).square()
        return torch.stack([weight @ self.reduction.of(piece).double(), weight @ piece.gradient.double().square()])

    def estimate(self, *sums: float) -> Estimate:
        s2, g2 = sums
        return _estimate(s2, g2, self.n, self.shards)
