"""The owner-reduction: an elementwise sum over all ranks' micro-gradients, kept by each element's owner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from agvm_ds.groups import numel_of
from agvm_ds.shards.base import Piece, Shards


@dataclass
class Bucket:
    """Some parameters' local contributions, side by side in one fp32 tensor while there are any."""

    members: list[int]
    """Indices of the parameters."""
    numel: int
    waiting: set[int] = field(default_factory=set)
    values: torch.Tensor | None = None

    def reset(self) -> None:
        """Empty; all members are waited for."""
        self.waiting, self.values = set(self.members), None


class OwnerReduction:
    """Adds up a quantity of each parameter's shape over micro-batches and ranks, into the shards of its owners.

    What a rank has to give goes into buckets of at most ``bucket_size`` elements (a larger parameter is a bucket by
    itself). A bucket is all-reduced, as DeepSpeed does with its own, when all its parameters have their gradients, and
    the owners add their elements to a shard. The order of the buckets is fixed, the reverse of the model's definition, so
    the ranks agree whatever order their gradients appear in, and where a parameter has none on some rank. One bucket for
    the whole model is reduced once an update, in ``finish``; several are reduced in each micro-batch, so that every rank must
    have as many of them.

    Memory, from the first gradient to ``stop``: one bucket and one gradient shard in fp32, and one bucket more for each that
    is begun before its turn. A backward in reverse order of definition begins none; a parameter without gradient holds up the
    buckets behind its own until the backward ends.
    """

    def __init__(self, shards: Shards, bucket_size: int) -> None:
        self.shards = shards
        self._device = shards.engine.device
        self._fragments = shards.fragments()
        self._numel = [numel_of(owned.parameter) for owned in shards.optimizer.owned]
        self._buckets = _buckets(_backward_order(shards), self._numel, bucket_size)
        self._place: dict[int, tuple[Bucket, int]] = {}
        for bucket in self._buckets:
            offset = 0
            for index in bucket.members:
                self._place[index] = bucket, offset
                offset += self._numel[index]
        self._owned: list[torch.Tensor] = []
        self._next = 0

    def start(self) -> None:
        """Begin an update: the sums are zero. Nothing is allocated before the first gradient."""
        self._owned = []
        self._rewind()

    stop = start
    """Give the memory back."""

    @property
    def waits(self) -> bool:
        """Whether ranks wait for each other within a backward."""
        return len(self._buckets) > 1

    def _rewind(self) -> None:
        self._next = 0
        for bucket in self._buckets:
            bucket.reset()

    def slot(self, index: int) -> torch.Tensor:
        """Where to add this rank's contribution of a parameter, shape (elements,), before ``arrived`` is called."""
        bucket, offset = self._place[index]
        return self._values(bucket)[offset : offset + self._numel[index]]

    def _values(self, bucket: Bucket) -> torch.Tensor:
        if bucket.values is None:
            bucket.values = torch.zeros(bucket.numel, dtype=torch.float32, device=self._device)
        return bucket.values

    def arrived(self, index: int) -> None:
        """The parameter's contribution of this micro-batch is in its slot."""
        if not self.waits:
            return
        self._place[index][0].waiting.discard(index)
        while self._next < len(self._buckets) and not self._buckets[self._next].waiting:
            self._reduce(self._buckets[self._next])
            self._next += 1

    def end_micro_batch(self) -> None:
        """The backward is over; where there are several buckets every rank must call this."""
        if self.waits:
            for bucket in self._buckets[self._next :]:
                self._reduce(bucket)
            self._rewind()

    def finish(self) -> None:
        """The update's micro-batches are over; every rank must call this, once or more."""
        if not self._owned:
            for bucket in self._buckets:
                self._reduce(bucket)

    def _reduce(self, bucket: Bucket) -> None:
        """Add up a bucket over the ranks, keep what this rank owns of it, and drop it."""
        values = self.shards.add_up(self._values(bucket))
        self._owned = self._owned or self.shards.zeros()
        for index in bucket.members:
            fragment, offset = self._fragments[index], self._place[index][1]
            if fragment is not None:
                mine = self._owned[fragment.buffer][fragment.start : fragment.start + fragment.numel]
                mine.add_(values[offset + fragment.first :][: fragment.numel].to(mine.device))
        bucket.values = None

    def of(self, piece: Piece) -> torch.Tensor:
        """The sums over ranks and micro-batches for a piece's elements, after ``finish``."""
        return piece.of(self._owned[piece.buffer])


def _backward_order(shards: Shards) -> list[int]:
    """The parameters from the model's last to its first."""
    place = {id(parameter): i for i, parameter in enumerate(shards.engine.module.parameters())}
    owned = shards.optimizer.owned
    return sorted(range(len(owned)), key=lambda index: -place[id(owned[index].parameter)])


def _buckets(order: Sequence[int], numel: Sequence[int], bucket_size: int) -> list[Bucket]:
    buckets: list[Bucket] = []
    for index in order:
        if not buckets or buckets[-1].numel + numel[index] > bucket_size:
            buckets.append(Bucket([], 0))
        buckets[-1].members.append(index)
        buckets[-1].numel += numel[index]
    return buckets
