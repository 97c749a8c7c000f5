"""Gradient variance the naive way, to compare with: what the official mmcv hook does, put on a DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from deepspeed import comm

from agvm_ds.variance import split_variance


class NaiveSplit:
    """Phi of two halves of the ranks: both all-reduced one parameter at a time, sent around whole, compared on one rank.

    A copy of every local gradient is kept while the backward runs, for ZeRO takes gradients away. The result is sent to
    all ranks, ``variances`` by module, and modulates nothing. Two ranks or more; no preconditioning.
    """

    def __init__(self, engine: Any, modules: list[str], interval: int) -> None:
        self.engine, self.modules, self.interval = engine, modules, interval
        named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
        self._module = [next(m for m in modules if name.startswith(f"{m}.")) for name, _ in named]
        self.variances: dict[str, float] = {}
        self._kept: dict[int, torch.Tensor] = {}
        for index, (_, parameter) in enumerate(named):
            parameter.register_hook(self._keep(index))
        take_step = engine._take_model_step

        @wraps(take_step)
        def step(*args: Any, **kwargs: Any) -> None:
            if self._measured():
                self.variances = self._measure()
            self._kept.clear()
            take_step(*args, **kwargs)

        engine._take_model_step = step

    def _measured(self) -> bool:
        return int(self.engine.global_steps) % self.interval == 0

    def _keep(self, index: int) -> Callable[[torch.Tensor], None]:
        def hook(gradient: torch.Tensor) -> None:
            if self._measured():
                before = self._kept.get(index)
                self._kept[index] = gradient.clone() if before is None else before + gradient

        return hook

    def _measure(self) -> dict[str, float]:
        rank, ranks = comm.get_rank(), comm.get_world_size()
        first_of_b = ranks // 2
        sides = ((0, first_of_b, rank < first_of_b), (first_of_b, ranks - first_of_b, rank >= first_of_b))
        table = torch.zeros(len(self.modules), 3, dtype=torch.float64)
        for index in sorted(self._kept):
            gradient = self._kept[index].reshape(-1)
            halves = []
            for first, size, mine in sides:
                half = gradient / size if mine else torch.zeros_like(gradient)
                comm.all_reduce(half)
                comm.broadcast(half, first)  # every rank has it already; the official code gathers it all the same
                halves.append(half)
            if rank == 0:
                one, other = (half.double() for half in halves)
                row = self.modules.index(self._module[index])
                table[row] += torch.stack([one @ other, one @ one, other @ other])
        comm.broadcast(table, 0)
        rows = zip(self.modules, table.tolist(), strict=True)
        return {name: split_variance(ab, aa, bb) for name, (ab, aa, bb) in rows}
