"""What is summed while gradients appear: one file an estimator."""

from __future__ import annotations

from agvm_ds.config import AGVMConfig
from agvm_ds.estimators.base import Estimate, Estimator
from agvm_ds.estimators.pairwise import Pairwise, PreconditionedPairwise
from agvm_ds.estimators.split import PreconditionedSplit, Split
from agvm_ds.shards import Shards

__all__ = ["Estimate", "Estimator", "estimator_of"]


def estimator_of(config: AGVMConfig, preconditioned: bool, shards: Shards) -> Estimator:
    """The estimator that the ``agvm`` block asks for; preconditioned: of the gradient as the Adam sees it."""
    if config.estimator == "split":
        return (PreconditionedSplit if preconditioned else Split)(shards, config.reduce_bucket_size)
    if preconditioned:
        return PreconditionedPairwise(shards, config.reduce_bucket_size)
    return Pairwise(shards)
