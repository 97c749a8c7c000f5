"""How an engine spreads its state over ranks and flat buffers: what has to agree for DeepSpeed's own loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm
from pydantic import BaseModel, ConfigDict

from agvm_ds.groups import MODULE, NAME, PARAMS
from agvm_ds.optimizer import Owned
from agvm_ds.shards import Fragment, shards_of


@dataclass(frozen=True)
class Placed:
    """A run's parameters as its optimizer got them, before ZeRO put flat buffers in their place."""

    owned: list[Owned]
    names: list[str]
    """Of the parameters, in the same order."""
    param_groups: Sequence[Mapping[str, Any]]
    """The optimizer's own, each with a unique ``"name"``."""

    @classmethod
    def of(cls, module: torch.nn.Module, groups: Sequence[Mapping[str, Any]]) -> Placed:
        """Of groups of ``agvm_ds.param_groups``, before the engine is made."""
        names = {id(p): name for name, p in module.named_parameters()}
        owned = [Owned(i, group[MODULE], p) for i, group in enumerate(groups) for p in group[PARAMS]]
        return cls(owned, [names[id(item.parameter)] for item in owned], groups)


class Layout(BaseModel):
    """Everything on which it depends which file of a checkpoint has what; equal layouts load each other's files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ranks: int
    stage: int
    precision: str
    """"float32", "bfloat16" or "float16"."""
    optimizer: str
    """The base's class."""
    wrapper: str
    """DeepSpeed's class around it."""
    groups: list[str]
    """Names of the parameter groups."""
    parameters: list[str]
    """Names of the parameters in the order in which the optimizer got them."""
    group_of: list[int]
    """For each parameter, the index of its group."""
    fragments: list[list[tuple[int, int, int, int] | None]]
    """For each rank and parameter: (buffer, start in the rank's part of it, first element, elements); stage 0: empty."""

    def differences(self, other: Layout) -> list[str]:
        """What this (a checkpoint) and another (a run) do not share, in words."""
        pairs = [
            ("ranks", self.ranks, other.ranks),
            ("ZeRO stage", self.stage, other.stage),
            ("precision", self.precision, other.precision),
            ("optimizer", self.optimizer, other.optimizer),
            ("parameter groups", len(self.groups), len(other.groups)),
        ]
        found = [f"{what} {there} -> {here}" for what, there, here in pairs if there != here]
        return found or (["the cut into buffers or parameter groups"] if self != other else [])


def layout_of(engine: Any, placed: Placed) -> Layout:
    """The layout of an engine; every rank must call it."""
    optimizer = engine.basic_optimizer
    stage = int(engine.zero_optimization_stage())
    return Layout(
        ranks=comm.get_world_size(),
        stage=stage,
        precision=str(engine.get_data_types()[0]).removeprefix("torch."),
        optimizer=getattr(optimizer, "base", type(optimizer)).__name__,
        wrapper=type(engine.optimizer).__name__ if engine.optimizer is not optimizer else "",
        groups=[str(group[NAME]) for group in placed.param_groups],
        parameters=placed.names,
        group_of=[item.group for item in placed.owned],
        fragments=_gathered(fragments_of(engine, placed)) if stage else [],
    )


def fragments_of(engine: Any, placed: Placed) -> list[Fragment | None]:
    """For each parameter, what this rank's flat buffers have of it (ZeRO 1 to 3)."""
    return shards_of(engine, placed).fragments()  # type: ignore[arg-type]


def _gathered(mine: list[Fragment | None]) -> list[list[tuple[int, int, int, int] | None]]:
    plain = [None if f is None else (f.buffer, f.start, f.first, f.numel) for f in mine]
    found: list[Any] = [None] * comm.get_world_size()
    torch.distributed.all_gather_object(found, plain)
    return found
