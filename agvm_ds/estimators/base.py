"""What every estimator of the gradient variance offers to the controller."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from agvm_ds.shards import OwnerReduction, Piece, Shards, chunk_of


def square_norm(chunk: torch.Tensor) -> torch.Tensor:
    """|chunk|^2 as a float64 scalar. On a CPU torch makes a float64 copy for it: see in_chunks."""
    return torch.linalg.vector_norm(chunk, dtype=torch.float64).square()


class ModuleSums:
    """Float64 sums by module of many small results, which are kept until all are there: a few kernels add them up."""

    def __init__(self, modules: int, rows: int, device: torch.device) -> None:
        self._sums = torch.zeros(modules, rows, dtype=torch.float64, device=device)
        self._results: list[torch.Tensor] = []
        self._modules: list[int] = []

    def add(self, module: int, result: torch.Tensor) -> None:
        """Add a tensor of as many elements as there are rows to the sums of a module, given by its index."""
        self._results.append(result)
        self._modules.append(module)

    def total(self) -> torch.Tensor:
        """Shape (rows, modules): the sums so far."""
        if self._results:
            table = self._worth(torch.stack(self._results)).to(self._sums.device).reshape(len(self._results), -1)
            self._sums.index_add_(0, torch.tensor(self._modules, device=table.device), table)
            self._results, self._modules = [], []
        return self._sums.T

    def _worth(self, results: torch.Tensor) -> torch.Tensor:
        return results


class SquareNorms(ModuleSums):
    """Sums by module of |tensor|^2. It stands in a hook of every parameter: as little as can be is done there."""

    def __init__(self, modules: int, device: torch.device) -> None:
        super().__init__(modules, 1, device)

    def of(self, module: int, tensor: torch.Tensor) -> None:
        """Add a tensor's squared norm."""
        most = chunk_of(tensor)
        for chunk in (tensor,) if tensor.numel() <= most else tensor.reshape(-1).split(most):
            self.add(module, torch.linalg.vector_norm(chunk, dtype=torch.float64))

    def _worth(self, results: torch.Tensor) -> torch.Tensor:
        return results.square()


@dataclass(frozen=True)
class Estimate:
    """One module's statistics in one measured update; nan: undefined."""

    variance: float
    """Phi, in [0, 2]."""
    noise_scale: float = math.nan
    """B in images; inf when the micro-gradients do not agree at all."""
    noise: float = math.nan
    """Trace of one image's gradient covariance."""
    signal: float = math.nan
    """|true gradient|^2, which may come out below 0: noise_scale is noise / signal."""


class Estimator(ABC):
    """Accumulates what it needs of each local micro-gradient, then turns the ranks' sums into one Estimate a module.

    One measured update: ``start``; for each micro-batch ``observe`` of every parameter that has a gradient, then
    ``end_micro_batch``; ``local_sums``, an all-reduce of those by the caller, ``estimates``. An update that is not
    measured calls none of them. The micro-gradients appear divided by the accumulation steps.
    """

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self.modules = shards.optimizer.modules
        self._index = {name: i for i, name in enumerate(self.modules)}
        self._module = [self._index[owned.module] for owned in shards.optimizer.owned]

    @property
    def n(self) -> int:
        """Micro-batches in an update."""
        return self.shards.micro_batches

    def module_sums(self, rows: int) -> ModuleSums:
        """Sums by module, ``rows`` of them each, zero so far, on the engine's device."""
        return ModuleSums(len(self.modules), rows, self.shards.engine.device)

    def square_norms(self) -> SquareNorms:
        """The same of squared norms."""
        return SquareNorms(len(self.modules), self.shards.engine.device)

    @abstractmethod
    def start(self) -> None:
        """Forget what an earlier update, or an interrupted one, has left."""

    @abstractmethod
    def observe(self, index: int, gradient: torch.Tensor) -> None:
        """Take in a parameter's gradient of one micro-batch, as the backward produces it (index in ``optimizer.owned``)."""

    def end_micro_batch(self, step: int) -> None:  # noqa: B027 - most have nothing to do
        """The backward of accumulation step ``step`` is over; every rank calls this at the same point."""

    @abstractmethod
    def local_sums(self) -> torch.Tensor:
        """This rank's float64 numbers, to be added up over the ranks; called once the gradients are averaged."""

    @abstractmethod
    def estimates(self, sums: torch.Tensor) -> list[Estimate]:
        """One Estimate a module from the added-up numbers."""

    @abstractmethod
    def squares(self, sums: torch.Tensor) -> torch.Tensor:
        """Of the added-up numbers, the squared norms of gradients as DeepSpeed holds them."""

    def usable(self, sums: torch.Tensor) -> bool:
        """Whether the added-up numbers are finite, and the squared norms so in fp32 too.

        DeepSpeed 0.19 takes a norm that overflows fp32 for a bad gradient in some stages (1, 2, and 0 in bf16) and steps in
        the others; here such an update is unusable in all of them.
        """
        return bool(torch.isfinite(sums).all() and torch.isfinite(self.squares(sums).sum().float()))


class ElementwiseEstimator(Estimator):
    """An estimator that also needs one elementwise quantity, added up at the owners of the elements.

    It counts the local gradients of each module too: where no rank had any, what DeepSpeed shows as the averaged gradient
    may be an earlier update's, and the variance is undefined.
    """

    rows: int
    """Sums a module."""

    def __init__(self, shards: Shards, bucket_size: int) -> None:
        super().__init__(shards)
        self.reduction = OwnerReduction(shards, bucket_size)
        self._seen = [0] * len(self.modules)

    def start(self) -> None:
        self.reduction.start()
        self._seen = [0] * len(self.modules)

    def observe(self, index: int, gradient: torch.Tensor) -> None:
        self.contribute(self.reduction.slot(index), gradient.detach().reshape(-1).float())
        self._seen[self._module[index]] += 1
        self.reduction.arrived(index)

    def end_micro_batch(self, step: int) -> None:
        self.reduction.end_micro_batch(last=step == self.shards.accumulation - 1)

    def local_sums(self) -> torch.Tensor:
        """Shape (2 + rows, modules): how often a gradient was seen, |G|^2 and the ``rows`` sums over the local shard."""
        found = self.module_sums(1 + self.rows)
        for piece in self.shards.pieces():
            column = torch.cat([square_norm(piece.gradient).reshape(1), self.sums_of(piece)])
            found.add(self._index[piece.module], column)
        self.reduction.stop()
        sums = found.total()
        return torch.cat([torch.tensor([self._seen], dtype=sums.dtype, device=sums.device), sums])

    def estimates(self, sums: torch.Tensor) -> list[Estimate]:
        return [self.estimate(*rest) if seen else Estimate(math.nan) for seen, _, *rest in sums.T.tolist()]

    def squares(self, sums: torch.Tensor) -> torch.Tensor:
        return sums[1]

    @abstractmethod
    def contribute(self, slot: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add to the slot what a parameter's local micro-gradient has to give; both fp32, shape (elements,)."""

    @abstractmethod
    def sums_of(self, piece: Piece) -> torch.Tensor:
        """Shape (rows,), float64: a piece's part in its module's sums."""

    @abstractmethod
    def estimate(self, *sums: float) -> Estimate:
        """The statistics of a module from its ``rows`` sums over all ranks."""
