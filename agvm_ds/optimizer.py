"""AGVM as a client optimizer: any elementwise torch optimizer, whose learning rates are modulated during the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.optim import Optimizer

from agvm_ds.bases import problem_of
from agvm_ds.config import ConfigError
from agvm_ds.groups import MODULE, NAME, PARAMS, numel_of


@dataclass(frozen=True)
class Owned:
    """One of the model's parameters, as it was given to AGVM."""

    group: int
    """Index of its parameter group."""
    module: str
    parameter: torch.Tensor


class AGVM(Optimizer):
    """``base``, stepping module i with the learning rate lr_i mu_i; afterwards every group shows lr_i again.

    The scale factors mu come from ``engine.agvm`` once ``agvm_ds.attach(engine)`` has been called (or by
    ``agvm_ds.initialize``). The object is an instance of ``base`` too: ``param_groups``, ``state``, ``state_dict()``,
    learning-rate schedulers and DeepSpeed's checkpoints are the base's own, and nothing is kept twice.

    params: groups of ``agvm_ds.param_groups``, each with ``"module"`` and a unique ``"name"``.
    base: an optimizer that treats each element by itself, of ``torch.optim`` or DeepSpeed. options: its arguments.

    Raises ConfigError when a group lacks its module or name, or for a base that cannot be modulated (LBFGS, Muon, ...),
    and RuntimeError for a step before ``attach``.
    """

    def __new__(cls, params: Any = None, base: type[Optimizer] = torch.optim.SGD, **options: Any) -> AGVM:
        return super().__new__(_with_base(base) if cls is AGVM else cls)  # type: ignore[arg-type]

    def __init__(self, params: Any, base: type[Optimizer] = torch.optim.SGD, **options: Any) -> None:
        groups = list(params)
        _check_groups(groups)
        if problem := problem_of(base):
            raise ConfigError(problem)
        self.base = base
        self.attached = False
        self._factors: Mapping[str, float] = {}
        # ZeRO replaces a group's parameters by a flat partition: remember which ones were the module's.
        self.owned = [Owned(i, group[MODULE], p) for i, group in enumerate(groups) for p in group[PARAMS]]
        super().__init__(groups, **options)
        if issubclass(base, torch.optim.Adagrad):
            self.state.clear()  # made for parameters that ZeRO will replace; its step makes it anew

    def drop_untrained(self) -> None:
        """Forget what DeepSpeed has left out: parameters frozen since the groups were made, and those without elements."""
        self.owned = [one for one in self.owned if one.parameter.requires_grad and numel_of(one.parameter)]

    @property
    def modules(self) -> list[str]:
        """The modules' names, in the order of the groups."""
        return list(dict.fromkeys(owned.module for owned in self.owned))

    @property
    def rates(self) -> dict[str, Any]:
        """Module -> the learning rate that its first parameter group shows: a number, or a tensor if it was given as one."""
        rates: dict[str, Any] = {}
        for group in self.param_groups:
            rates.setdefault(group[MODULE], group["lr"])
        return rates

    @contextmanager
    def modulated(self, factors: Mapping[str, float]) -> Iterator[None]:
        """Steps within this context use lr_i factors[i]; a module without a factor uses lr_i."""
        self._factors = factors
        try:
            yield
        finally:
            self._factors = {}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of the base with modulated learning rates. ZeRO calls it once a group or sub-group."""
        if not self.attached and self._has_gradient():
            raise RuntimeError(
                "AGVM.step() before agvm_ds.attach(engine): call it once, after deepspeed.initialize "
                "(agvm_ds.initialize does both)"
            )
        shown = [(group, group["lr"]) for group in self.param_groups]
        try:
            for group, lr in shown:
                factor = self._factors.get(group[MODULE])
                if factor is not None:
                    group["lr"] = lr * factor
            return _unhooked(self.base.step)(self, closure)
        finally:
            for group, lr in shown:
                group["lr"] = lr

    def _has_gradient(self) -> bool:
        """DeepSpeed makes a base create its state by stepping with zero gradients: that is not a step of training."""
        gradients = (p.grad for group in self.param_groups for p in group[PARAMS])
        return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


@cache
def _with_base(base: type[Optimizer]) -> type[AGVM]:
    return type(f"AGVM_{base.__name__}", (AGVM, base), {})


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """The base's step without torch's hook wrapper: AGVM.step has one already, and hooks would run twice."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined, no-any-return]


def _check_groups(groups: Sequence[Any]) -> None:
    for index, group in enumerate(groups):
        if not isinstance(group, Mapping) or MODULE not in group or NAME not in group:
            raise ConfigError(
                f'AGVM: parameter group {index} has no "{MODULE}" or "{NAME}"; make groups with '
                "agvm_ds.param_groups(model, ...)"
            )
    names = [group[NAME] for group in groups]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f'AGVM: the "{NAME}" of parameter groups must be unique; given twice: {sorted(twice)}')
