"""Losses and gradients that are nan or infinite: the run stops, or skips a few such updates, and says who had them.

Who it was is looked for only when something is wrong. mmdet averages each loss over the ranks before the backward, so that
all know of a bad one at no cost. Of a bad gradient all know when DeepSpeed has skipped the update (``overflow`` sees to it
that each stage does); the update is then taken once more from the same random state, with each parameter's gradient looked
at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from mmdet.utils import get_root_logger
from torch import nn

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.checks.image_names import names_of
from agvm_ds.mmdet.detector.losses import Losses
from agvm_ds.mmdet.detector.modules import modules_of
from agvm_ds.mmdet.detector.overflow import loss_scaled, skip_in_every_stage
from agvm_ds.mmdet.randomness import random_state, set_random_state, untouched_randomness

KEY = "max_nonfinite_updates"
"""The mmdet config's: how many bad updates in a row are skipped before the run stops."""

_LOSS, _GRADIENT = "a loss is not finite", "a gradient, or its squared norm, is not finite"
_NOBODY = {
    _LOSS: "each rank's own is finite: their mean overflows. The micro-batches were",
    _GRADIENT: "taken again, every micro-batch's is finite: their sum overflows, or the fault comes and goes. They were",
}


class NonFiniteError(ConfigError):
    """One update too many with a loss or gradient that is not finite."""


@dataclass
class MicroBatch:
    """A micro-batch of one rank, and what it had that is not finite."""

    index: int
    """Accumulation step."""
    images: list[str]
    losses: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, list[str]] = field(default_factory=dict)
    """module -> its parameters, both in the order in which the backward comes to them."""

    @property
    def bad(self) -> bool:
        """Whether it had anything."""
        return bool(self.losses or self.gradients)

    def __str__(self) -> str:
        found = [f"{name} = {value}" for name, value in self.losses.items()]
        found += [f"gradients of {module}: {_some(names)}" for module, names in self.gradients.items()]
        return "; ".join([f"micro-batch {self.index}", *found, f"images {', '.join(self.images)}"])


class NumberWatch:
    """Follows the updates of an EngineModel: ``begin``, ``checked`` in each micro-batch before its backward, ``end``.

    limit: how many bad updates in a row are skipped. data: the training set, for the images' ids.
    """

    def __init__(self, engine: Any, limit: int = 0, data: Any = None) -> None:
        self.engine = engine
        self.limit = limit
        self.data = data
        self.in_a_row = 0
        self._module_of = _modules_by_parameter(engine)
        self._t = 0
        self._micro_batches: list[MicroBatch] = []
        self._start: dict[str, Any] = {}
        self._buffers: list[torch.Tensor] = []
        self._again = False
        skip_in_every_stage(engine)

    def begin(self) -> None:
        """Before an update: keep what it takes to have it once more and, if it may be skipped, to undo its forwards."""
        self._t, self._micro_batches, self._start = int(self.engine.global_steps), [], random_state()
        if self.limit:
            self._buffers = [buffer.clone() for buffer in self.engine.module.buffers()]

    def checked(
        self, loss: torch.Tensor, mean: float, terms: Losses, metas: Sequence[Mapping[str, Any]]
    ) -> torch.Tensor:
        """What to differentiate in a micro-batch; mean: of the ranks' losses, terms: what this rank's is made of.

        A bad loss may have good gradients: in an update that is to be skipped they become nan. Raises NonFiniteError.
        """
        if math.isfinite(mean) and not self._again:
            return loss
        step = self.engine.micro_steps % self.engine.gradient_accumulation_steps()
        self._micro_batches.append(MicroBatch(step, names_of(metas, self.data), _not_finite(loss, terms)))
        if self._again:
            return loss
        if self.in_a_row >= self.limit:
            raise NonFiniteError(self._message(_LOSS))
        return loss * math.nan

    def end(self, update: Callable[[], Any]) -> None:
        """After the update, which ``update`` takes again. Raises NonFiniteError."""
        if not self._micro_batches and (self.engine.was_step_applied() or loss_scaled(self.engine)):
            self.in_a_row = 0
            return
        fault = _LOSS if self._micro_batches else _GRADIENT
        if fault == _GRADIENT:
            self._take_again(update)
        message = self._message(fault)
        if self.in_a_row >= self.limit:
            raise NonFiniteError(message)
        self.in_a_row += 1
        for buffer, before in zip(self.engine.module.buffers(), self._buffers, strict=True):
            buffer.copy_(before)
        get_root_logger().warning("%s\n  skipped: %d of %d in a row", message, self.in_a_row, self.limit)

    def _take_again(self, update: Callable[[], Any]) -> None:
        """By the ordinary way, so that ranks meet in the ordinary order; DeepSpeed skips it again. Counters go back first."""
        engine = self.engine
        engine.global_steps -= 1
        engine.skipped_steps -= 1
        engine.global_samples -= engine.train_batch_size()
        unmeasured = nullcontext() if engine.agvm is None else engine.agvm.paused(self._t)
        with untouched_randomness(), unmeasured, self._looking():
            set_random_state(self._start)
            update()

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Note the parameters whose gradients are not finite; those that go on to DeepSpeed are nan."""
        with ExitStack() as stack:
            for name, parameter in self.engine.module.named_parameters():
                if parameter.requires_grad:
                    stack.callback(parameter.register_hook(self._hook(name)).remove)
            self._again = True
            try:
                yield
            finally:
                self._again = False

    def _hook(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def hook(gradient: torch.Tensor) -> torch.Tensor:
            if not torch.isfinite(torch.linalg.vector_norm(gradient.detach().float()).square()):
                found = self._micro_batches[-1].gradients.setdefault(self._module_of[name], [])
                found.extend([name] * (name not in found))
            return torch.full_like(gradient, math.nan)

        return hook

    def _message(self, fault: str) -> str:
        """The same on every rank; all must call this."""
        by_rank: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(by_rank, self._micro_batches)
        seen = [(rank, one) for rank, micro_batches in enumerate(by_rank) for one in micro_batches]
        lines = [f"rank {rank}, {one}" for rank, one in seen if one.bad]
        lines = lines or [_NOBODY[fault], *(f"rank {rank}, {one}" for rank, one in seen)]
        advice = (
            "nothing of this update is applied. Look at these images and their annotations; a lower learning rate, a longer "
            f"warm-up or gradient clipping may help. {KEY} in the mmdet config, now {self.limit}, is how many such updates "
            "in a row are skipped before the run stops"
        )
        return "\n  ".join([f"update {self._t}: {fault}", *lines, advice])


def _modules_by_parameter(engine: Any) -> dict[str, str]:
    """name of a parameter -> its AGVM module; with AGVM off, the one that it would be in."""
    owned = {id(one.parameter): one.module for one in engine.agvm.optimizer.owned} if engine.agvm is not None else {}
    return {name: owned.get(id(p)) or _child(name, engine.module) for name, p in engine.module.named_parameters()}


def _child(name: str, detector: nn.Module) -> str:
    return next((module for module in modules_of(detector) if name.startswith(f"{module}.")), name)


def _not_finite(loss: torch.Tensor, terms: Losses) -> dict[str, float]:
    """name -> value of the loss terms (mmdet: whose names have "loss" in them) that are not finite, or of their sum."""
    means = {
        name: float(sum(one.detach().mean() for one in ([term] if isinstance(term, torch.Tensor) else term)))
        for name, term in {**terms, "loss": loss}.items()
        if "loss" in name
    }
    bad = {name: value for name, value in means.items() if not math.isfinite(value)}
    return {name: value for name, value in bad.items() if name != "loss" or len(bad) == 1}


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
