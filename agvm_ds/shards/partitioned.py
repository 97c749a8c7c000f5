"""Stages 1 and 2: one flat buffer a parameter group, cut into equal parts, one a rank."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from agvm_ds.shards.base import FlatShards, Fragment


class PartitionedGradients(FlatShards):
    """DeepSpeedZeroOptimizer of stages 1 and 2, with ZeRO-Offload or without."""

    @property
    def offloaded(self) -> bool:
        return bool(self.engine.optimizer.cpu_offload)

    def group_indices(self) -> list[int]:
        return list(range(len(self.optimizer.param_groups)))

    def partitions(self) -> list[torch.Tensor]:
        return list(self.engine.optimizer.single_partition_of_fp32_groups)

    def fragments(self) -> list[Fragment | None]:
        sizes = [partition.numel() for partition in self.partitions()]
        found = {
            id(parameter): _common(buffer, offset, parameter.numel(), self.rank * sizes[buffer], sizes[buffer])
            for buffer, parameter, offset in self.placed()
        }
        return [found[id(owned.parameter)] for owned in self.optimizer.owned]

    def placed(self) -> Iterator[tuple[int, torch.Tensor, int]]:
        """(buffer, parameter, where the parameter begins in the whole buffer)."""
        zero = self.engine.optimizer
        columns = zip(zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, strict=True)
        for buffer, (parameters, offsets) in enumerate(columns):
            for parameter, offset in zip(parameters, offsets, strict=True):
                yield buffer, parameter, int(offset)


class Bf16Gradients(PartitionedGradients):
    """BF16_Optimizer (stage 1, bf16 weights, fp32 accumulation): a rank has all fp32 gradients, and owns a part."""

    @property
    def offloaded(self) -> bool:
        return False

    @property
    def place(self) -> str:
        return "fp32_groups_gradient_flat_partition"

    def partitions(self) -> list[torch.Tensor]:
        return list(self.engine.optimizer.fp32_groups_flat_partition)

    def gradients(self, buffer: int) -> list[torch.Tensor]:
        return [self.engine.optimizer.fp32_groups_gradient_flat_partition[buffer]]

    def placed(self) -> Iterator[tuple[int, torch.Tensor, int]]:
        for buffer, parameters in enumerate(self.engine.optimizer.bf16_groups):
            offset = 0
            for parameter in parameters:
                yield buffer, parameter, offset
                offset += parameter.numel()


def _common(buffer: int, offset: int, numel: int, begin: int, size: int) -> Fragment | None:
    """What a parameter at ``offset`` of the whole buffer has in common with the ``size`` elements from ``begin`` on."""
    low, high = max(offset, begin), min(offset + numel, begin + size)
    return Fragment(buffer, low - begin, low - offset, high - low) if low < high else None
