"""An mmcv hook that gives one micro-batch of one rank a bad loss or gradient, and records what every update changed.

For configs: ``custom_imports = dict(imports=["tests.faults.numbers"])`` and
``custom_hooks = [dict(type="FaultHook", faults=[(update, rank, micro-batch, kind)], place=folder)]``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from mmcv.runner import HOOKS, Hook

LAYER = "neck.lateral_convs.0.conv"
"""Where bad gradients begin: those of the heads are good."""


@HOOKS.register_module()
class FaultHook(Hook):
    """kinds: "loss" (nan), "constant" (an infinite loss with good gradients), "gradient" (nan), "drawn" (nan, of
    a random number), "once" (nan, but not when it is computed again), "huge" (finite, its square overflows).
    """

    def __init__(self, faults: list[Any], place: str) -> None:
        self.faults = {(update, rank, index): kind for update, rank, index, kind in faults}
        self.place = Path(place)
        self.drawn: dict[int, float] = {}
        self.records: list[dict[str, Any]] = []
        self.random: list[torch.Tensor] = []

    def before_run(self, runner: Any) -> None:
        self.runner, self.engine = runner, runner.model.engine
        detector = runner.model.module
        self._wrap(detector, "forward_train", self._losses)
        self._wrap(runner.model, "train_step", self._recorded)
        self._wrap(runner.model, "_update", self._random)
        detector.get_submodule(LAYER).register_forward_hook(self._layer)

    @staticmethod
    def _wrap(owner: Any, name: str, around: Any) -> None:
        inner = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: around(inner, *args, **kwargs))

    def _fault(self) -> str | None:
        index = self.engine.micro_steps % self.engine.gradient_accumulation_steps()
        return self.faults.get((self.runner.iter, self.runner.rank, index))

    def _losses(self, forward_train: Any, *args: Any, **kwargs: Any) -> Any:
        losses = forward_train(*args, **kwargs)
        if self._fault() == "loss":
            losses["loss_cls"] = losses["loss_cls"] * math.nan
        if self._fault() == "constant":
            losses["loss_cls"] = losses["loss_cls"] + math.inf
        return losses

    def _layer(self, _: Any, __: Any, output: torch.Tensor) -> None:
        kind = self._fault()
        if kind == "drawn":
            number = torch.rand(()).item()
            kind = "gradient" if number == self.drawn.setdefault(self.runner.iter, number) else None
        if kind in ("gradient", "once", "huge"):
            output.register_hook(lambda gradient: gradient * (1e25 if kind == "huge" else math.nan))
        if kind == "once":
            torch.rand(())
            self.faults = {place: fault for place, fault in self.faults.items() if place[0] != self.runner.iter}

    def _random(self, update: Any, *args: Any) -> Any:
        try:
            return update(*args)
        finally:
            self.random.append(torch.get_rng_state())

    def _recorded(self, train_step: Any, *args: Any, **kwargs: Any) -> Any:
        before, self.random = self._state(), []
        try:
            return train_step(*args, **kwargs)
        finally:
            self.records.append(
                {"update": self.runner.iter, "before": before, "after": self._state(), "random": self.random[0]}
            )
            torch.save(self.records, self.place / f"records_{self.runner.rank}.pt")

    def _state(self) -> dict[str, Any]:
        """Whole fp32 weights and buffers; this rank's part of the optimizer's state; scale factors and counters."""
        engine = self.engine
        momenta = [
            value.clone()
            for state in engine.basic_optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]
        return {
            "weights": {name: value.clone() for name, value in self.runner.weights().items()},
            "momenta": momenta,
            "agvm": engine.agvm and engine.agvm.state_dict(),
            "counters": (int(engine.global_steps), int(engine.skipped_steps), int(engine.global_samples)),
            "random": torch.get_rng_state(),
        }
