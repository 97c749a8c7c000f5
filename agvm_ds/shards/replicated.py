"""Stage 0: every rank holds every averaged gradient; the ranks own the parameters in turn, for the sums alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch

from agvm_ds.optimizer import AGVM
from agvm_ds.shards.base import Fragment, Piece, ShardError, Shards, in_chunks


class ReplicatedGradients(Shards):
    """Each parameter is a buffer of its own, all of it owned by one rank."""

    def __init__(self, engine: Any, optimizer: AGVM) -> None:
        super().__init__(engine, optimizer)
        self._masters = masters_beside(engine.optimizer)

    def _is_mine(self, buffer: int) -> bool:
        return buffer % self.ranks == self.rank

    def pieces(self, absent: Collection[int] = ()) -> Iterator[Piece]:
        for buffer, owned in enumerate(self.optimizer.owned):
            if not self._is_mine(buffer):
                continue
            gradient = owned.parameter.grad
            if gradient is None and not owned.parameter.requires_grad:
                continue  # frozen since the start: the controller says so
            if gradient is None:
                shape = tuple(owned.parameter.shape)
                raise ShardError(f"module {owned.module}: a parameter of shape {shape} has no averaged gradient")
            start = 0
            for chunk in in_chunks([gradient]):
                yield Piece(owned.group, owned.module, buffer, start, chunk)
                start += chunk.numel()

    def fragments(self) -> list[Fragment | None]:
        sizes = [owned.parameter.numel() for owned in self.optimizer.owned]
        return [Fragment(i, 0, 0, size) if self._is_mine(i) else None for i, size in enumerate(sizes)]

    def zeros(self) -> list[torch.Tensor]:
        parameters = [owned.parameter for owned in self.optimizer.owned]
        sizes = [p.numel() if self._is_mine(buffer) else 0 for buffer, p in enumerate(parameters)]
        return [torch.zeros(n, dtype=torch.float32, device=p.device) for n, p in zip(sizes, parameters, strict=True)]

    def masters(self) -> list[torch.Tensor]:
        found = []
        for buffer, owned in enumerate(self.optimizer.owned):
            master, start = self._master(buffer)
            size = owned.parameter.numel() if self._is_mine(buffer) else 0
            found.append(master.detach().reshape(-1)[start : start + size])
        return found

    def state_key(self, piece: Piece) -> torch.Tensor:
        return self._master(piece.buffer)[0]

    def second_moment(self, piece: Piece) -> torch.Tensor:
        start = piece.start + self._master(piece.buffer)[1]
        return super().second_moment(Piece(piece.group, piece.module, piece.buffer, start, piece.gradient))

    def _master(self, buffer: int) -> tuple[torch.Tensor, int]:
        """What the optimizer steps in a parameter's place, and where the parameter begins in it."""
        parameter = self.optimizer.owned[buffer].parameter
        return self._masters.get(id(parameter), (parameter, 0))

    def set_clipping(self, max_norm: float) -> None:
        if hasattr(self.engine.optimizer, "clip_grad"):  # half precision: a wrapper of DeepSpeed's clips
            super().set_clipping(max_norm)
        else:
            self.engine._config.gradient_clipping = max_norm


def masters_beside(wrapper: Any) -> dict[int, tuple[torch.Tensor, int]]:
    """Half precision: id of a parameter -> its fp32 copy, and where it begins in it (fused Adams: one flat one a group)."""
    found: dict[int, tuple[torch.Tensor, int]] = {}
    halves = getattr(wrapper, "fp16_groups", [])
    for index, group in enumerate(halves):
        start = 0
        for position, parameter in enumerate(group):
            if hasattr(wrapper, "fp32_groups_flat"):
                found[id(parameter)] = wrapper.fp32_groups_flat[index], start
            else:
                found[id(parameter)] = wrapper.fp32_groups[index][position], 0
            start += parameter.numel()
    return found
