"""Stage 3: each parameter is cut over the ranks; a parameter group is one flat buffer, or several (sub-groups)."""

from __future__ import annotations

import torch

from agvm_ds.shards.base import FlatShards, Fragment


class PartitionedParameters(FlatShards):
    """DeepSpeedZeroOptimizer_Stage3, with ZeRO-Offload or without."""

    stale = True
    """Its buffers are written over where gradients come, and shown again where none has."""

    @property
    def offloaded(self) -> bool:
        return bool(self.engine.optimizer.offload_optimizer)

    def group_indices(self) -> list[int]:
        owner = self.engine.optimizer.sub_group_to_group_id
        return [owner[index] for index in range(len(owner))]

    def partitions(self) -> list[torch.Tensor]:
        return list(self.engine.optimizer.fp32_partitioned_groups_flat)

    def fragments(self) -> list[Fragment | None]:
        found: dict[int, Fragment | None] = {}
        for buffer, parameters in enumerate(self.engine.optimizer.fp16_groups):
            start = 0
            for parameter in parameters:
                part, whole = int(parameter.partition_numel()), int(parameter.ds_numel)
                numel = min(part, whole - self.rank * part)
                found[id(parameter)] = Fragment(buffer, start, self.rank * part, numel) if numel > 0 else None
                start += part
        return [found[id(owned.parameter)] for owned in self.optimizer.owned]
