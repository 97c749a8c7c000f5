"""A DeepSpeed checkpoint read parameter by parameter, whatever ZeRO stage and number of ranks wrote it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from agvm_ds.checkpoints.layout import Layout
from agvm_ds.checkpoints.safety import weights_only
from agvm_ds.engine import PARTITIONED_WEIGHTS

PARTITIONS = ("single_partition_of_fp32_groups", "fp32_flat_groups")
"""What the stages call a rank's fp32 partitions; what they call the base's state dict follows."""
BASE_STATE = ("base_optimizer_state", "optimizer_state_dict")
ZERO_STATE = "optimizer_state_dict"


@dataclass(frozen=True)
class Parameter:
    """All that an optimizer has of one parameter."""

    fp32: torch.Tensor
    """Flat."""
    state: dict[str, Any]
    """Tensors are flat, or scalars (copies: an optimizer counts in place)."""


def either(state: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """What a state dict has under the one of the keys that it has."""
    return next(state[key] for key in keys if key in state)


class WholeState:
    """Reads lazily: files are mapped into memory, and only what is asked for is touched."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder = folder
        self.layout = layout
        self._index = {name: i for i, name in enumerate(layout.parameters)}

    @cached_property
    def common(self) -> dict[str, Any]:
        """DeepSpeed's counters, its scheduler's state, and the client_state: the same in the files of all ranks."""
        return self._model(0)

    @cached_property
    def base(self) -> dict[str, Any]:
        """The base optimizer's state dict, with the parameter groups of the run that saved."""
        if self.layout.stage:
            return dict(either(self._zero(0), BASE_STATE))
        saved = self.common["optimizer"]
        return dict(saved.get(ZERO_STATE, saved))

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's state dict; parameters that were trained are the fp32 masters."""
        found = dict(self.common["module"])
        if self.layout.stage == PARTITIONED_WEIGHTS:
            found |= {name: self._frozen(name, shape) for name, shape in self.common["frozen_param_shapes"].items()}
        shapes = self._shapes()
        for name in self.layout.parameters:
            found[name] = self._fp32(self._index[name]).view(shapes[name])
        for name, tied_to in (self.common.get("shared_params") or {}).items():
            found[name] = found[tied_to]
        return found

    def parameter(self, name: str) -> Parameter:
        """A trained parameter. Raises KeyError for one that the checkpoint does not have."""
        index = self._index[name]
        return Parameter(self._fp32(index), self._state(index))

    def _fp32(self, index: int) -> torch.Tensor:
        if not self.layout.stage:
            return self._replicated_fp32(index)
        parts = [
            either(self._zero(rank), PARTITIONS)[buffer].view(-1)[here] for rank, buffer, here in self._runs(index)
        ]
        return torch.cat(parts)

    def _state(self, index: int) -> dict[str, Any]:
        return self._sharded_state(index) if self.layout.stage else self._replicated_state(index)

    # ZeRO 1 to 3: runs of flat buffers, in the files of the ranks

    def _runs(self, index: int) -> list[tuple[int, int, slice]]:
        """(rank, buffer, where in the rank's part of it) of a parameter's elements, in their order."""
        cuts = [(cut[index], rank) for rank, cut in enumerate(self.layout.fragments)]
        runs = sorted((cut[2], rank, cut[0], cut[1], cut[3]) for cut, rank in cuts if cut is not None)
        return [(rank, buffer, slice(start, start + numel)) for _, rank, buffer, start, numel in runs]

    def _sharded_state(self, index: int) -> dict[str, Any]:
        parts: dict[str, list[Any]] = {}
        for rank, buffer, here in self._runs(index):
            for key, flat in self._base(rank).get(buffer, {}).items():
                parts.setdefault(key, []).append(flat.view(-1)[here] if is_flat(flat) else flat)
        return {key: torch.cat(found) if is_flat(found[0]) else copy.deepcopy(found[0]) for key, found in parts.items()}

    def _base(self, rank: int) -> dict[int, dict[str, Any]]:
        return dict(either(self._zero(rank), BASE_STATE)["state"])

    def _frozen(self, name: str, shape: torch.Size) -> torch.Tensor:
        parts = [self._model(rank)["frozen_param_fragments"][name] for rank in range(self.layout.ranks)]
        return torch.cat(parts)[: shape.numel()].view(shape)

    # Stage 0: whole tensors, in the file of rank 0; under a fused Adam in half precision one flat one a group

    def _replicated_state(self, index: int) -> dict[str, Any]:
        if self._flat is not None:
            group, here = self._places[index]
            state = self.base["state"].get(group, {})
            return {
                key: value.view(-1)[here] if is_flat(value) else copy.deepcopy(value) for key, value in state.items()
            }
        return {
            key: value.reshape(-1) if key in self._elementwise else self._count(index, key)
            for key, value in self.base["state"].get(index, {}).items()
        }

    def _count(self, index: int, key: str) -> Any:
        """DeepSpeed's FusedAdam counts steps with the last parameter of each group alone."""
        if self.layout.optimizer != "FusedAdam":
            return self.base["state"][index][key]
        group = [i for i, one in enumerate(self.layout.group_of) if one == self.layout.group_of[index]]
        return max(self.base["state"][i][key] for i in group if i in self.base["state"])

    @cached_property
    def _flat(self) -> list[torch.Tensor] | None:
        found: list[torch.Tensor] | None = (self.common["optimizer"] or {}).get("fp32_groups_flat")
        return found

    @cached_property
    def _places(self) -> list[tuple[int, slice]]:
        """For each parameter its group, and where it is in the flat tensor."""
        ends: dict[int, int] = {}
        shapes, found = self._shapes(), []
        for name, group in zip(self.layout.parameters, self.layout.group_of, strict=True):
            start = ends.get(group, 0)
            ends[group] = start + shapes[name].numel()
            found.append((group, slice(start, ends[group])))
        return found

    @cached_property
    def _elementwise(self) -> set[str]:
        """Of a parameter without dimensions every state looks like a count: the others tell."""
        return {key for state in self.base["state"].values() for key, value in state.items() if is_flat(value)}

    def _replicated_fp32(self, index: int) -> torch.Tensor:
        if self._flat is not None:
            group, here = self._places[index]
            return self._flat[group].view(-1)[here]
        masters = self.common["optimizer"].get("fp32_groups")
        if masters is None:
            return self.common["module"][self.layout.parameters[index]].reshape(-1)
        return [master for group in masters for master in group][index].reshape(-1)

    # Files

    def _shapes(self) -> dict[str, torch.Size]:
        if self.layout.stage != PARTITIONED_WEIGHTS:
            return {name: value.shape for name, value in self.common["module"].items()}
        return {name: shape for group in self.common["param_shapes"] for name, shape in group.items()}

    def _model(self, rank: int) -> dict[str, Any]:
        if self.layout.stage == PARTITIONED_WEIGHTS:
            return self._read(f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        return self._read("mp_rank_00_model_states.pt")

    def _zero(self, rank: int) -> dict[str, Any]:
        prefix = "bf16_" if self.layout.precision == "bfloat16" else ""
        return dict(self._read(f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")[ZERO_STATE])

    def _read(self, name: str) -> dict[str, Any]:
        if name not in self._files:
            with weights_only():
                self._files[name] = torch.load(self.folder / name, map_location="cpu", mmap=True)
        return self._files[name]

    @cached_property
    def _files(self) -> dict[str, dict[str, Any]]:
        return {}


def is_flat(value: Any) -> bool:
    """Whether a state is one number an element, not a count of the whole buffer."""
    return isinstance(value, torch.Tensor) and value.dim() > 0
