"""What every estimator of the gradient variance offers to the controller."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from agvm_ds.shards import Shards


@dataclass(frozen=True)
class Estimate:
    """One module's statistics in one measured update; nan: undefined."""

    variance: float
    """Phi, in [0, 2]."""
    noise_scale: float = math.nan
    """B in images; inf when the micro-gradients do not agree at all."""


class Estimator(ABC):
    """Accumulates what it needs of each local micro-gradient, then turns the ranks' sums into one Estimate a module.

    One measured update: ``start``, ``observe`` for every parameter and micro-batch, ``local_sums``, an all-reduce of
    those by the caller, ``estimates``. An update that is not measured calls none of them.
    """

    def __init__(self, modules: Sequence[str], device: torch.device | str) -> None:
        self.modules = list(modules)
        self.device = device

    @abstractmethod
    def start(self) -> None:
        """Forget what an earlier update, or an interrupted one, has left."""

    @abstractmethod
    def observe(self, module: int, gradient: torch.Tensor) -> None:
        """Take in one parameter's gradient of one micro-batch, as the backward produces it (index of its module)."""

    @abstractmethod
    def local_sums(self, shards: Shards) -> torch.Tensor:
        """This rank's float64 numbers, to be added up over the ranks; called once the gradients are averaged."""

    @abstractmethod
    def estimates(self, sums: torch.Tensor, *, ranks: int, accumulation: int, images: int) -> list[Estimate]:
        """One Estimate a module from the added-up numbers; ``images`` is the size of a micro-batch."""
