"""Where DeepSpeed 0.19 keeps averaged gradients and second moments: one interface, one file a layout."""

from __future__ import annotations

from typing import Any

from agvm_ds.optimizer import AGVM
from agvm_ds.shards.base import Fragment, Piece, ShardError, Shards, chunk_of, in_chunks
from agvm_ds.shards.partitioned import Bf16Gradients, PartitionedGradients
from agvm_ds.shards.reduction import OwnerReduction
from agvm_ds.shards.replicated import ReplicatedGradients, masters_beside
from agvm_ds.shards.whole import cut, gathered
from agvm_ds.shards.zero3 import PartitionedParameters

STAGES: dict[int, type[Shards]] = {
    0: ReplicatedGradients,
    1: PartitionedGradients,
    2: PartitionedGradients,
    3: PartitionedParameters,
}

__all__ = [
    "STAGES",
    "Fragment",
    "OwnerReduction",
    "Piece",
    "ShardError",
    "Shards",
    "chunk_of",
    "cut",
    "gathered",
    "in_chunks",
    "masters_beside",
    "shards_of",
]


def shards_of(engine: Any, optimizer: AGVM) -> Shards:
    """The shards of an engine's ZeRO stage."""
    if type(engine.optimizer).__name__ == "BF16_Optimizer":
        return Bf16Gradients(engine, optimizer)
    return STAGES[int(engine.zero_optimization_stage())](engine, optimizer)
