"""What every estimator of the gradient variance offers to the controller."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from agvm_ds.shards import OwnerReduction, Piece, Shards, chunk_of


def square_norm(chunk: torch.Tensor) -> torch.Tensor:
    """|chunk|^2 as a float64 scalar. On a CPU torch makes a float64 copy for it: see in_chunks."""
    return torch.linalg.vector_norm(chunk, dtype=torch.float64).square()


@contextmanager
def in_stream(stream: Any, gradient: torch.Tensor) -> Iterator[None]:
    """What a gradient's hook does within, it does in this stream of an accelerator, once the gradient is there.

    autograd may run hooks in several streams; what they share must be in one.
    """
    accelerator = get_accelerator()
    if accelerator.resolves_data_dependency() or accelerator.current_stream() == stream:
        yield
        return
    stream.wait_stream(accelerator.current_stream())
    gradient.record_stream(stream)
    with accelerator.stream(stream):
        yield


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

    def end_micro_batch(self) -> None:  # noqa: B027 - most have nothing to do
        """A micro-batch's backward is over."""

    def refuse_broken_backward(self) -> None:  # noqa: B027
        """Raise RuntimeError when the ranks cannot go on after a backward that broke off on this one."""

    def release(self) -> None:  # noqa: B027
        """Give back what was kept for ``local_sums``."""

    @abstractmethod
    def local_sums(self, absent: Collection[int] = ()) -> torch.Tensor:
        """This rank's float64 numbers, to be added up over the ranks, once the gradients are averaged; every rank calls it.

        absent: see ``Shards.pieces``.
        """

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
    """An estimator that also needs one elementwise quantity, added up at the owners of the elements."""

    rows: int
    """Sums a module."""

    def __init__(self, shards: Shards, bucket_size: int) -> None:
        super().__init__(shards)
        self.reduction = OwnerReduction(shards, bucket_size)
        self.micro_batches_done = 0

    def start(self) -> None:
        self.reduction.start()
        self.micro_batches_done = 0
        self._stream = get_accelerator().current_stream()

    def observe(self, index: int, gradient: torch.Tensor) -> None:
        with in_stream(self._stream, gradient):
            self.contribute(self.reduction.slot(index), gradient.detach().reshape(-1).float())
            self.reduction.arrived(index)

    def end_micro_batch(self) -> None:
        self.reduction.end_micro_batch()
        self.micro_batches_done += 1

    def refuse_broken_backward(self) -> None:
        if self.reduction.waits:
            raise RuntimeError(
                "AGVM: a backward has failed on this rank, while others wait for it in theirs to reduce their buckets: an "
                "agvm.reduce_bucket_size that takes the whole model leaves such an update unmeasured instead"
            )

    def release(self) -> None:
        self.reduction.stop()

    def local_sums(self, absent: Collection[int] = ()) -> torch.Tensor:
        """Shape (1 + rows, modules): |G|^2 and the ``rows`` sums over the local shard."""
        self.reduction.finish()
        found = self.module_sums(1 + self.rows)
        for piece in self.shards.pieces(absent):
            column = torch.cat([square_norm(piece.gradient).reshape(1), self.sums_of(piece)])
            found.add(self._index[piece.module], column)
        return found.total()

    def estimates(self, sums: torch.Tensor) -> list[Estimate]:
        return [self.estimate(*rest) for _, *rest in sums.T.tolist()]

    def squares(self, sums: torch.Tensor) -> torch.Tensor:
        return sums[0]

    @abstractmethod
    def contribute(self, slot: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add to the slot what a parameter's local micro-gradient has to give; both fp32, shape (elements,)."""

    @abstractmethod
    def sums_of(self, piece: Piece) -> torch.Tensor:
        """Shape (rows,), float64: a piece's part in its module's sums."""

    @abstractmethod
    def estimate(self, *sums: float) -> Estimate:
        """The statistics of a module from its ``rows`` sums over all ranks."""
