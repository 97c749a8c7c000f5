"""Whole parameters of what the ranks own, and back: values that lie as the shards do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from agvm_ds.groups import numel_of
from agvm_ds.shards.base import Shards


def gathered(shards: Shards, parts: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """For each parameter of ``shards.optimizer.owned`` its whole, flat, fp32; every rank must read all of them.

    parts: for each buffer, this rank's part of it. An element has one owner, so the sum over the ranks, zeros elsewhere,
    is exact. Two copies of one parameter at a time are all that it needs.
    """
    for owned, fragment in zip(shards.optimizer.owned, shards.fragments(), strict=True):
        whole = torch.zeros(numel_of(owned.parameter), device=shards.engine.device)
        if fragment is not None:
            here = slice(fragment.start, fragment.start + fragment.numel)
            whole[fragment.first : fragment.first + fragment.numel] = parts[fragment.buffer][here]
        yield shards.add_up(whole)


def cut(shards: Shards, wholes: Iterable[torch.Tensor | None], parts: Sequence[torch.Tensor]) -> None:
    """The reverse: write what this rank owns of each whole parameter into ``parts``; what is None stays as it is there."""
    for fragment, whole in zip(shards.fragments(), wholes, strict=True):
        if fragment is not None and whole is not None:
            there = whole.reshape(-1)[fragment.first : fragment.first + fragment.numel]
            parts[fragment.buffer][fragment.start : fragment.start + fragment.numel] = there
