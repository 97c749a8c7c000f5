"""What every way of keeping gradients offers: this rank's shard of the averaged gradient, and who owns which element.

At an accumulation boundary, before the step, a rank's shard holds gradients that are averaged over ranks and
accumulation steps, not yet clipped, and still multiplied by the loss scale. Every element of the global gradient is in
exactly one rank's shard; the optimizer's state for it is with the same rank. A shard that is expected and not found is
an error, never a zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator

from agvm_ds.groups import MODULE
from agvm_ds.optimizer import AGVM

SECOND_MOMENT = "exp_avg_sq"
"""Key of the Adams' second moment in an optimizer's state."""

CHUNK_ON_CPU, CHUNK = 2**16, 2**20
"""Elements that are worked on at once: what float64 copies of them stay in a CPU's cache, or keep an accelerator busy."""


class ShardError(RuntimeError):
    """A gradient shard is not where this ZeRO stage keeps it."""


def chunk_of(tensor: torch.Tensor) -> int:
    """How many of a tensor's elements are worked on at once."""
    return CHUNK_ON_CPU if tensor.device.type == "cpu" else CHUNK


def in_chunks(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The tensors' elements, in order, in runs of at most a chunk: large tensors are cut, small neighbours put together."""
    waiting: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        most = chunk_of(tensor)
        for part in tensor.reshape(-1).split(most):
            if waiting and size + part.numel() > most:
                yield _together(waiting)
                waiting, size = [], 0
            waiting.append(part)
            size += part.numel()
    if waiting:
        yield _together(waiting)


def _together(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class Fragment:
    """The run of one parameter's elements that this rank owns; there is never more than one."""

    buffer: int
    """Index of the flat buffer."""
    start: int
    """Where the run begins in this rank's part of the buffer."""
    first: int
    """Where it begins in the flattened parameter."""
    numel: int


@dataclass(frozen=True)
class Piece:
    """A run of this rank's shard of the averaged gradient, of one parameter group, small enough to be worked on at once."""

    group: int
    """Index of the parameter group."""
    module: str
    buffer: int
    start: int
    """Where the run begins in this rank's part of the buffer."""
    gradient: torch.Tensor
    """Shape (elements,)."""

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """This piece's run of a tensor that is laid out as this rank's part of the buffer."""
        return flat.view(-1)[self.start : self.start + self.gradient.numel()]


class Shards(ABC):
    """This rank's part of the averaged gradients and second moments, by AGVM module."""

    def __init__(self, engine: Any, optimizer: AGVM) -> None:
        self.engine = engine
        self.optimizer = optimizer

    @property
    def group(self) -> Any:
        """The process group over which gradients are averaged."""
        return self.engine.data_parallel_group

    @cached_property
    def ranks(self) -> int:
        """Data-parallel ranks."""
        return int(comm.get_world_size(group=self.group))

    @cached_property
    def rank(self) -> int:
        """This process's place among the data-parallel ranks."""
        return int(comm.get_rank(group=self.group))

    @property
    def accumulation(self) -> int:
        """Accumulation steps of an update."""
        return int(self.engine.gradient_accumulation_steps())

    @property
    def micro_batches(self) -> int:
        """n, in an update: of all ranks."""
        return self.ranks * self.accumulation

    @property
    def loss_scale(self) -> float:
        """What the loss, and so every gradient here, is multiplied by."""
        if (scaler := self.engine.torch_autocast_z0_gradscaler) is not None:
            return float(scaler.get_scale())
        return float(getattr(self.engine.optimizer, "loss_scale", None) or 1.0)

    def add_up(self, sums: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the ranks, in place."""
        comm.all_reduce(sums, group=self.group)
        return sums

    stale = False
    """Whether a parameter without a gradient in this update may still show an earlier update's."""

    @abstractmethod
    def pieces(self, absent: Collection[int] = ()) -> Iterator[Piece]:
        """This rank's shard of the averaged gradient. Raises ShardError when a part is missing.

        absent: indices of ``optimizer.owned`` that had no gradient in this update on any rank: theirs is zero, whatever a
        stale shard shows.
        """

    @abstractmethod
    def fragments(self) -> list[Fragment | None]:
        """For each parameter of ``optimizer.owned``, what this rank has of it."""

    @abstractmethod
    def zeros(self) -> list[torch.Tensor]:
        """For each buffer, fp32 zeros of the size of this rank's part of it, where its gradient is."""

    @abstractmethod
    def masters(self) -> list[torch.Tensor]:
        """For each buffer, this rank's part of the weights that the optimizer steps: flat, live, fp32 in every precision."""

    @abstractmethod
    def state_key(self, piece: Piece) -> torch.Tensor:
        """The tensor by which the optimizer knows the part of the buffer that the piece is of."""

    def second_moment(self, piece: Piece) -> torch.Tensor:
        """v of the Adams for the piece's elements, as it stands before the update; zeros before the first one."""
        moment = self.optimizer.state.get(self.state_key(piece), {}).get(SECOND_MOMENT)
        return torch.zeros_like(piece.gradient, dtype=torch.float32) if moment is None else piece.of(moment)

    def set_clipping(self, max_norm: float) -> None:
        """Let the coming step clip the global gradient to this norm; 0: not at all."""
        self.engine.optimizer.clip_grad = max_norm


class FlatShards(Shards):
    """ZeRO: a rank's part of each flat buffer is one fp32 partition, with the optimizer's state of the same layout."""

    @property
    def stale(self) -> bool:  # type: ignore[override]
        """ZeRO-Offload's gradients on the host are written over, never cleared."""
        return self.offloaded

    def pieces(self, absent: Collection[int] = ()) -> Iterator[Piece]:
        fragments = self.fragments() if absent else []
        holes = [fragment for index in absent if (fragment := fragments[index]) is not None]
        if self.offloaded:
            get_accelerator().synchronize()  # the copies to the host are not waited for before the step
        for buffer, (group, partition) in enumerate(zip(self.group_indices(), self.partitions(), strict=True)):
            module, start = self.optimizer.param_groups[group][MODULE], 0
            gradients = self._checked(module, buffer, partition)
            if mine := [hole for hole in holes if hole.buffer == buffer]:
                gradients = [_cleared(gradients, mine)]
            for gradient in in_chunks(gradients):
                yield Piece(group, module, buffer, start, gradient)
                start += gradient.numel()

    def _checked(self, module: str, buffer: int, partition: torch.Tensor) -> list[torch.Tensor]:
        where = f"module {module}: {self.place} of buffer {buffer}, ZeRO stage {self.engine.zero_optimization_stage()}"
        gradients = self.gradients(buffer)
        if gradients is None or any(gradient is None for gradient in gradients):
            raise ShardError(f"{where} is missing at an accumulation boundary")
        found = sum(gradient.numel() for gradient in gradients)
        if found != partition.numel():
            raise ShardError(f"{where} has {found} elements, expected {partition.numel()}")
        return list(gradients)

    def zeros(self) -> list[torch.Tensor]:
        return [torch.zeros(p.numel(), dtype=torch.float32, device=p.device) for p in self.partitions()]

    def masters(self) -> list[torch.Tensor]:
        return [partition.detach().view(-1) for partition in self.partitions()]

    def state_key(self, piece: Piece) -> torch.Tensor:
        return self.partitions()[piece.buffer]

    @property
    def place(self) -> str:
        """What DeepSpeed calls the place where the gradients are."""
        return "gradient of the offloaded partition" if self.offloaded else "averaged_gradients"

    def gradients(self, buffer: int) -> Any:
        """This rank's part of a buffer's gradient as a list of tensors, None where there is none."""
        if self.offloaded:
            return [self.partitions()[buffer].grad]
        return self.engine.optimizer.averaged_gradients.get(buffer)

    @property
    @abstractmethod
    def offloaded(self) -> bool:
        """Whether ZeRO-Offload keeps the optimizer's state, and so the gradient, in the host's memory."""

    @abstractmethod
    def group_indices(self) -> list[int]:
        """For each flat buffer, the index of its parameter group."""

    @abstractmethod
    def partitions(self) -> list[torch.Tensor]:
        """For each flat buffer, this rank's fp32 partition of it."""


def _cleared(gradients: Iterable[torch.Tensor], holes: Iterable[Fragment]) -> torch.Tensor:
    """A copy, in one piece, with zeros in the holes."""
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    for hole in holes:
        flat[hole.start : hole.start + hole.numel] = 0
    return flat
