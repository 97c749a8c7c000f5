"""A checkpoint of another layout put into an engine: other ranks, ZeRO stage, precision, modules or optimizer.

What DeepSpeed would have written of this run at that moment is made on each rank, from the whole parameters, and handed to
DeepSpeed's ordinary loading. (Its universal checkpoints know neither stage 0 nor optimizers without ``exp_avg``, and in
stage 3 give every parameter group the settings of the first.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed import comm

from agvm_ds.checkpoints.layout import Layout, Placed, fragments_of
from agvm_ds.checkpoints.vault import CheckpointError
from agvm_ds.checkpoints.whole import BASE_STATE, PARTITIONS, WholeState, either, is_flat
from agvm_ds.groups import NAME, PARAMS
from agvm_ds.shards import shards_of

_SCALER = ("loss_scaler", "dynamic_loss_scale")


def load_into(engine: Any, saved: WholeState, placed: Placed, layout: Layout) -> list[str]:
    """Weights, optimizer state, counters and scheduler; returns what could not be kept. Every rank must call it.

    layout: the engine's. Raises CheckpointError when the checkpoint is of another model.
    """
    weights = saved.weights()
    _refuse_other_model(engine, weights, placed)
    keeps = saved.layout.optimizer == layout.optimizer
    new = [name for name in placed.names if name not in saved.layout.parameters]
    engine.load_module_state_dict({"module": weights}, strict=True, fetch_z3_params=True)
    keeps_scale = all(one.stage and one.precision == "float16" for one in (saved.layout, layout))
    _Target(engine, placed, saved, weights, keeps, keeps_scale).load()
    for key in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, key, saved.common[key])
    if engine.lr_scheduler is not None and saved.common.get("lr_scheduler"):
        engine.lr_scheduler.load_state_dict(saved.common["lr_scheduler"])
    lost = [] if keeps_scale or "float16" not in (saved.layout.precision, layout.precision) else ["the loss scale"]
    lost += [] if keeps else [f"the optimizer's state: that of {saved.layout.optimizer} is not {layout.optimizer}'s"]
    return lost + ([f"no optimizer state for {len(new)} parameters not trained before ({new[0]})"] if new else [])


def _refuse_other_model(engine: Any, weights: Mapping[str, torch.Tensor], placed: Placed) -> None:
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
    for name, shape in shapes.items():
        if name not in weights:
            raise CheckpointError(f"the checkpoint has no parameter {name}: it is of another model")
        if tuple(weights[name].shape) != shape:
            raise CheckpointError(
                f"parameter {name}: shape {tuple(weights[name].shape)} in the checkpoint, {shape} in this run's model"
            )


class _Target:
    """The engine's side, by kind of DeepSpeed optimizer."""

    def __init__(
        self,
        engine: Any,
        placed: Placed,
        saved: WholeState,
        weights: Mapping[str, torch.Tensor],
        keeps: bool,
        keeps_scale: bool,
    ) -> None:
        self.engine, self.placed, self.saved, self.weights = engine, placed, saved, weights
        self.keeps, self.keeps_scale = keeps, keeps_scale

    def load(self) -> None:
        if self.engine.zero_optimization():
            self._load_zero()
        elif hasattr(self.engine.optimizer, "fp32_groups"):
            self._load_masters()
        elif hasattr(self.engine.optimizer, "fp32_groups_flat"):
            self._load_flat_masters()
        else:
            self.engine.basic_optimizer.load_state_dict(self._replicated_base())

    # ZeRO 1 to 3

    def _load_zero(self) -> None:
        optimizer = self.engine.optimizer
        state = optimizer.state_dict()
        partitions, buffers = self._buffers()
        state[next(key for key in PARTITIONS if key in state)] = partitions
        base = either(state, BASE_STATE)
        base["state"] = buffers if self.keeps else {}
        self._set_groups(base["param_groups"])
        if self.keeps_scale:
            state |= {key: value for key, value in self.saved._zero(0).items() if key in _SCALER and key in state}
        states = [None] * comm.get_world_size()
        states[comm.get_rank()] = state
        optimizer.load_state_dict(states, load_optimizer_states=True, load_from_fp32_weights=True)

    def _buffers(self) -> tuple[list[torch.Tensor], dict[int, dict[str, Any]]]:
        """(fp32 partitions, the base's state of each) of this rank."""
        sizes = [p.numel() for p in shards_of(self.engine, self.placed).partitions()]  # type: ignore[arg-type, attr-defined]
        partitions = [torch.zeros(size) for size in sizes]
        states: dict[int, dict[str, Any]] = {}
        for name, fragment in zip(self.placed.names, fragments_of(self.engine, self.placed), strict=True):
            if fragment is None:
                continue
            here = slice(fragment.start, fragment.start + fragment.numel)
            there = slice(fragment.first, fragment.first + fragment.numel)
            partitions[fragment.buffer][here] = self.weights[name].reshape(-1)[there]
            for key, value in self._state_of(name).items():
                mine = states.setdefault(fragment.buffer, {})
                if is_flat(value):
                    mine.setdefault(key, torch.zeros(sizes[fragment.buffer]))[here] = value[there]
                else:
                    mine.setdefault(key, value)
        return partitions, states

    def _state_of(self, name: str) -> dict[str, Any]:
        return self.saved.parameter(name).state if self.keeps and name in self.saved.layout.parameters else {}

    # Stage 0

    def _load_masters(self) -> None:
        """Half precision: whole fp32 copies beside the parameters."""
        state = self.engine.optimizer.state_dict()
        wanted = iter(self.placed.names)
        state["fp32_groups"] = [[self.weights[next(wanted)] for _ in group] for group in state["fp32_groups"]]
        state["optimizer_state_dict"] = self._replicated_base()
        self.engine.optimizer.load_state_dict(state)

    def _load_flat_masters(self) -> None:
        """The same under a fused Adam: one flat tensor a group, of masters as of each state."""
        state, base = self.engine.optimizer.state_dict(), self.engine.basic_optimizer.state_dict()
        wanted, flat = iter(self.placed.names), []
        for index, group in enumerate(self.engine.optimizer.fp16_groups):
            names = [next(wanted) for _ in group]
            flat.append(torch.cat([self.weights[name].reshape(-1) for name in names]))
            if states := self._states_together(names):
                base["state"][index] = states
        self._set_groups(base["param_groups"])
        self.engine.optimizer.load_state_dict({**state, "fp32_groups_flat": flat, "optimizer_state_dict": base})

    def _states_together(self, names: list[str]) -> dict[str, Any]:
        """Parameters' states one after the other; of one that has none they are zero."""
        states = [self._state_of(name) for name in names]
        zeros = [torch.zeros(self.weights[name].numel()) for name in names]
        together: dict[str, Any] = {}
        for key, value in next((state for state in states if state), {}).items():
            parts = [state.get(key, zero) for state, zero in zip(states, zeros, strict=True)]
            together[key] = torch.cat(parts) if is_flat(value) else value
        return together

    def _replicated_base(self) -> dict[str, Any]:
        base = self.engine.basic_optimizer.state_dict()
        for index, name in enumerate(self.placed.names):
            state = {
                key: value.view(self.weights[name].shape) if is_flat(value) else value
                for key, value in self._state_of(name).items()
            }
            if state:
                base["state"][index] = state
        self._set_groups(base["param_groups"])
        return dict(base)

    def _set_groups(self, groups: list[dict[str, Any]]) -> None:
        """A group of the same name goes on with its settings (rates, counters), as in an ordinary load."""
        before = {group.get(NAME): group for group in self.saved.base["param_groups"]} if self.keeps else {}
        for group in groups:
            group.update({key: value for key, value in before.get(group[NAME], {}).items() if key != PARAMS})
