"""The split estimator, the paper's: the disagreement of two halves of the batch (AGVM, section 3.2)."""

from __future__ import annotations

import torch

from agvm_ds.estimators.base import ElementwiseEstimator, Estimate
from agvm_ds.estimators.preconditioning import official_step
from agvm_ds.shards import Piece
from agvm_ds.variance import split_variance


class Split(ElementwiseEstimator):
    """Phi = 1 - cos(G_A, G_B), from D = G_A - G_B at the owners of the averaged gradient G.

    A: the micro-batches of the ranks below ranks // 2; with one rank, the first accumulation // 2 steps. With a of n
    micro-batches in A and b in B, G_A = G + (b / n) D and G_B = G - (a / n) D.
    """

    rows = 3

    @property
    def a(self) -> int:
        """Micro-batches in A."""
        ranks, accumulation = self.shards.ranks, self.shards.accumulation
        return (ranks // 2) * accumulation if ranks > 1 else accumulation // 2

    @property
    def b(self) -> int:
        """Micro-batches in B."""
        return self.n - self.a

    def _in_a(self) -> bool:
        if self.shards.ranks > 1:
            return self.shards.rank < self.shards.ranks // 2
        return self.micro_batches_done < self.a

    def contribute(self, slot: torch.Tensor, gradient: torch.Tensor) -> None:
        accumulation = self.shards.accumulation
        slot.add_(gradient, alpha=accumulation / self.a if self._in_a() else -accumulation / self.b)

    def sums_of(self, piece: Piece) -> torch.Tensor:
        """<G_A, G_B>, |G_A|^2 and |G_B|^2."""
        g, d = piece.gradient.double(), self.reduction.of(piece).double()
        one, other = self.seen_by_optimizer(piece, g + self.b / self.n * d, g - self.a / self.n * d)
        return torch.stack([one @ other, one @ one, other @ other])

    def seen_by_optimizer(self, piece: Piece, *halves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The halves as they are: a loss scale is of no effect on their cosine."""
        return halves

    def estimate(self, *sums: float) -> Estimate:
        return Estimate(split_variance(*sums))


class PreconditionedSplit(Split):
    """The same of the preconditioned halves, by the official implementation's formula."""

    def seen_by_optimizer(self, piece: Piece, *halves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        group = self.shards.optimizer.param_groups[piece.group]
        v, scale = self.shards.second_moment(piece).double(), self.shards.loss_scale
        return tuple(official_step(half / scale, v, self.n, group["betas"][1], group["eps"]) for half in halves)
