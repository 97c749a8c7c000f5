"""What is summed while gradients appear: one file an estimator."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from agvm_ds.estimators.base import Estimate, Estimator
from agvm_ds.estimators.pairwise import Pairwise

ESTIMATORS: dict[str, type[Estimator]] = {"pairwise": Pairwise}

__all__ = ["ESTIMATORS", "Estimate", "Estimator", "Pairwise", "estimator_of"]


def estimator_of(name: str, modules: Sequence[str], device: torch.device | str) -> Estimator:
    """The estimator that ``agvm.estimator`` names, for these modules; its sums live on ``device``."""
    return ESTIMATORS[name](modules, device)
