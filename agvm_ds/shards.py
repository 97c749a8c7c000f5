"""Where each ZeRO stage keeps its averaged gradients: one interface, a class a stage (DeepSpeed 0.19).

At an accumulation boundary, before the step, a rank's shard holds gradients that are averaged over ranks and
accumulation steps, not yet clipped, and still multiplied by the loss scale. Every element of the global gradient is in
exactly one rank's shard. A shard that is expected and not found is an error, never a zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed import comm

from agvm_ds.groups import MODULE
from agvm_ds.optimizer import AGVM


class ShardError(RuntimeError):
    """A gradient shard is not where this ZeRO stage keeps it."""


def square_norm(tensor: torch.Tensor) -> torch.Tensor:
    """|tensor|^2 as a float64 scalar on the tensor's device, without a float64 copy of the tensor."""
    return torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64).square()


class Shards(ABC):
    """This rank's part of the averaged gradients, by AGVM module."""

    def __init__(self, engine: Any, optimizer: AGVM) -> None:
        self.engine = engine
        self.optimizer = optimizer

    @property
    def group(self) -> Any:
        """The process group over which gradients are averaged."""
        return self.engine.data_parallel_group

    @property
    def ranks(self) -> int:
        """Data-parallel ranks."""
        return int(comm.get_world_size(group=self.group))

    @property
    def rank(self) -> int:
        """This process's place among the data-parallel ranks."""
        return int(comm.get_rank(group=self.group))

    def add_up(self, sums: torch.Tensor) -> torch.Tensor:
        """The sum of a small tensor over the ranks: the only collective of a pairwise measure."""
        comm.all_reduce(sums, group=self.group)
        return sums

    @abstractmethod
    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(module, gradient) pieces of this rank's shard. Raises ShardError when a piece is missing."""

    @abstractmethod
    def set_clipping(self, max_norm: float) -> None:
        """Let the coming step clip the global gradient to this norm; 0: not at all."""


class ReplicatedShards(Shards):
    """Stage 0: every rank holds every averaged gradient; rank r answers for each world-size-th parameter from r on."""

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        owned = list(self.optimizer.owned_parameters())[self.rank :: self.ranks]
        for module, parameter in owned:
            if parameter.grad is None:
                raise ShardError(
                    f"module {module}: a parameter of shape {tuple(parameter.shape)} has no averaged gradient"
                )
            yield module, parameter.grad

    def set_clipping(self, max_norm: float) -> None:
        if hasattr(self.engine.optimizer, "clip_grad"):  # half precision: a wrapper of DeepSpeed's clips
            self.engine.optimizer.clip_grad = max_norm
        else:
            self.engine._config.gradient_clipping = max_norm


class ZeroShards(Shards):
    """Stages 1 to 3: ``averaged_gradients`` maps a flat buffer's index to the pieces of this rank's partition."""

    def set_clipping(self, max_norm: float) -> None:
        self.engine.optimizer.clip_grad = max_norm

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        for index, (group, expected) in enumerate(zip(self.group_indices(), self.flat_partitions(), strict=True)):
            module = self.optimizer.param_groups[group][MODULE]
            for piece in self._pieces(module, index, expected.numel()):
                yield module, piece

    def _pieces(self, module: str, index: int, expected: int) -> Sequence[torch.Tensor]:
        where = f"module {module}: averaged_gradients[{index}] of ZeRO stage {self.engine.zero_optimization_stage()}"
        pieces = self.engine.optimizer.averaged_gradients.get(index)
        if pieces is None or any(piece is None for piece in pieces):
            raise ShardError(f"{where} is missing at an accumulation boundary")
        found = sum(piece.numel() for piece in pieces)
        if found != expected:
            raise ShardError(f"{where} has {found} elements, expected {expected}")
        return list(pieces)

    @abstractmethod
    def group_indices(self) -> Sequence[int]:
        """For each flat buffer, the index of its parameter group."""

    @abstractmethod
    def flat_partitions(self) -> Sequence[torch.Tensor]:
        """For each flat buffer, this rank's fp32 partition of it."""


class PartitionedGradients(ZeroShards):
    """Stages 1 and 2: one flat buffer a parameter group."""

    def group_indices(self) -> Sequence[int]:
        return range(len(self.optimizer.param_groups))

    def flat_partitions(self) -> Sequence[torch.Tensor]:
        return list(self.engine.optimizer.single_partition_of_fp32_groups)


class PartitionedParameters(ZeroShards):
    """Stage 3: each parameter group is cut into sub-groups, each a flat buffer."""

    def group_indices(self) -> Sequence[int]:
        owner = self.engine.optimizer.sub_group_to_group_id
        return [owner[index] for index in range(len(owner))]

    def flat_partitions(self) -> Sequence[torch.Tensor]:
        return list(self.engine.optimizer.fp32_partitioned_groups_flat)


STAGES: dict[int, type[Shards]] = {
    0: ReplicatedShards,
    1: PartitionedGradients,
    2: PartitionedGradients,
    3: PartitionedParameters,
}


def shards_of(engine: Any, optimizer: AGVM) -> Shards:
    """The shards of an engine's ZeRO stage."""
    return STAGES[int(engine.zero_optimization_stage())](engine, optimizer)
