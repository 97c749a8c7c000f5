"""A detector's losses for the log, means over the ranks: one all-reduce and one wait a micro-batch, not one a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed import comm
from mmdet.models import BaseDetector

from agvm_ds.mmdet.process.signals import RankWatch

WIDTH = 64
"""Numbers that the ranks share: how many losses there are, how many ranks are asked to stop, and the losses.

Fixed, so that no rank can wait for more.
"""

Losses = Mapping[str, torch.Tensor | Sequence[torch.Tensor]]


def parse_losses(
    detector: Any, losses: Losses, watch: RankWatch | None = None
) -> tuple[torch.Tensor, dict[str, float]]:
    """(this rank's loss, to differentiate; name -> mean over the ranks), as ``BaseDetector._parse_losses`` has them.

    A detector with a ``_parse_losses`` of its own, or with more than 60 losses, is asked itself. watch: is told whether any
    rank was asked to stop. Raises RuntimeError on every rank where one has another number of losses.
    """
    if type(detector)._parse_losses is not BaseDetector._parse_losses or len(losses) + 3 > WIDTH:
        loss, log_vars = detector._parse_losses(losses)
        return loss, dict(log_vars)
    means: dict[str, Any] = {name: _mean(name, value) for name, value in losses.items()}
    loss = sum(value for name, value in means.items() if "loss" in name)
    means["loss"] = loss
    asked, shared = _shared(means, watch is not None and watch.asked)
    if watch is not None:
        watch.hear_of(asked)
    return loss, shared


def _mean(name: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.mean()
    if isinstance(value, list):
        return sum(one.mean() for one in value)
    raise TypeError(f"{name} is not a tensor or list of tensors")


def _shared(means: Mapping[str, torch.Tensor], asked: bool) -> tuple[bool, dict[str, float]]:
    """(whether any rank is asked to stop, the means over the ranks)."""
    ranks = comm.get_world_size()
    values = torch.stack([value.detach().float() for value in means.values()])
    head = values.new_tensor([len(values), asked])
    numbers = torch.cat([head, values / ranks, values.new_zeros(WIDTH - len(head) - len(values))])
    comm.all_reduce(numbers)
    count, askers, *shared = numbers.tolist()
    if count != len(means) * ranks:
        names = ", ".join(means)
        raise RuntimeError(f"rank {comm.get_rank()} has {len(means)} losses, another rank not as many; here: {names}")
    return askers > 0, dict(zip(means, shared, strict=False))
