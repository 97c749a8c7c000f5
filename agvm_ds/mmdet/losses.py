"""A detector's losses for the log, means over the ranks: one all-reduce and one wait a micro-batch, not one a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed import comm
from mmdet.models import BaseDetector

WIDTH = 64
"""Numbers that the ranks share: how many losses there are, and the losses. Fixed, so that no rank can wait for more."""

Losses = Mapping[str, torch.Tensor | Sequence[torch.Tensor]]


def parse_losses(detector: Any, losses: Losses) -> tuple[torch.Tensor, dict[str, float]]:
    """(this rank's loss, to differentiate; name -> mean over the ranks), as ``BaseDetector._parse_losses`` has them.

    A detector with a ``_parse_losses`` of its own, or with 64 losses or more, is asked itself. Raises RuntimeError on every
    rank where one has another number of losses.
    """
    if type(detector)._parse_losses is not BaseDetector._parse_losses or len(losses) + 2 > WIDTH:
        loss, log_vars = detector._parse_losses(losses)
        return loss, dict(log_vars)
    means: dict[str, Any] = {name: _mean(name, value) for name, value in losses.items()}
    loss = sum(value for name, value in means.items() if "loss" in name)
    means["loss"] = loss
    return loss, _shared(means)


def _mean(name: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.mean()
    if isinstance(value, list):
        return sum(one.mean() for one in value)
    raise TypeError(f"{name} is not a tensor or list of tensors")


def _shared(means: Mapping[str, torch.Tensor]) -> dict[str, float]:
    ranks = comm.get_world_size()
    values = torch.stack([value.detach().float() for value in means.values()])
    numbers = torch.cat([values.new_tensor([len(values)]), values / ranks, values.new_zeros(WIDTH - 1 - len(values))])
    comm.all_reduce(numbers)
    count, *shared = numbers.tolist()
    if count != len(means) * ranks:
        names = ", ".join(means)
        raise RuntimeError(f"rank {comm.get_rank()} has {len(means)} losses, another rank not as many; here: {names}")
    return dict(zip(means, shared, strict=False))
