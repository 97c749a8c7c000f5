"""mmcv's and mmdet's hooks of averaged weights (YOLOX has one), under DeepSpeed: the averages stay beside the model.

They register each average as a buffer of the model, so that evaluated and published weights have twice the keys. Here the
model stays as it is; between epochs it holds the averages, as there, and a DeepSpeed checkpoint always has the weights
that are trained, with the averages in its client_state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from mmcv.runner import HOOKS
from mmcv.runner.hooks import EMAHook
from mmdet.core.hook import ExpMomentumEMAHook, LinearMomentumEMAHook

EMA_HOOKS = ("EMAHook", "ExpMomentumEMAHook", "LinearMomentumEMAHook")
"""mmcv's and mmdet's, by name; the one to use here has "Engine" before it."""


class EngineEMA:
    """Mixed in before one of these hooks; needs whole fp32 weights on every rank: ZeRO 0 to 2, no half precision."""

    skip_buffers: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_buffers: dict[str, torch.Tensor] = {}
        self.param_ema_buffer: dict[str, str] = {}
        self.averages_in_model = False
        self._module: Any = None

    @property
    def model_parameters(self) -> Mapping[str, torch.Tensor]:
        """What is averaged: the model's own tensors."""
        return dict(self._module.named_parameters()) if self.skip_buffers else self._module.state_dict()

    def before_run(self, runner: Any) -> None:
        """Begin with the model's weights, unless a resume has brought averages."""
        self._module = runner.model.module
        if not self.model_buffers:
            self.model_buffers = {name: value.data.clone() for name, value in self.model_parameters.items()}
        self.param_ema_buffer = {name: name for name in self.model_buffers}

    def before_train_epoch(self, runner: Any) -> None:
        """The weights to train come back."""
        self._set_averages_in_model(False)

    def after_train_epoch(self, runner: Any) -> None:
        """The averages are evaluated and published."""
        self._set_averages_in_model(True)

    def _set_averages_in_model(self, wanted: bool) -> None:
        if self.averages_in_model != wanted:
            self._swap_ema_parameters()  # type: ignore[attr-defined]
            self.averages_in_model = wanted

    @contextmanager
    def trained_weights(self) -> Iterator[None]:
        """The model holds the weights that are trained."""
        before = self.averages_in_model
        self._set_averages_in_model(False)
        try:
            yield
        finally:
            self._set_averages_in_model(before)

    def state(self) -> dict[str, torch.Tensor]:
        """The averages, for a checkpoint; only within ``trained_weights``."""
        return {name: value.detach().cpu().clone() for name, value in self.model_buffers.items()}

    def load_state(self, state: Mapping[str, torch.Tensor], device: Any) -> None:
        """Take a checkpoint's averages."""
        self.model_buffers = {name: value.to(device) for name, value in state.items()}


@HOOKS.register_module()
class EngineEMAHook(EngineEMA, EMAHook):
    """mmcv's EMAHook, which leaves buffers alone."""

    skip_buffers = True


@HOOKS.register_module()
class EngineExpMomentumEMAHook(EngineEMA, ExpMomentumEMAHook):
    """ExpMomentumEMAHook."""


@HOOKS.register_module()
class EngineLinearMomentumEMAHook(EngineEMA, LinearMomentumEMAHook):
    """LinearMomentumEMAHook."""


def engine_hooks(custom_hooks: Any) -> list[Any]:
    """A config's ``custom_hooks`` with the EMA hooks' types replaced; mmcv allows one alone without a list."""
    hooks = custom_hooks if isinstance(custom_hooks, (list, tuple)) else [custom_hooks] if custom_hooks else []
    return [
        {**hook, "type": f"Engine{hook['type']}"} if isinstance(hook, dict) and hook.get("type") in EMA_HOOKS else hook
        for hook in hooks
    ]


def ema_hooks(hooks: Iterable[Any]) -> list[EngineEMA]:
    """Those of a runner's hooks that average weights."""
    return [hook for hook in hooks if isinstance(hook, EngineEMA)]


@contextmanager
def trained_weights(hooks: Iterable[Any]) -> Iterator[None]:
    """The model holds the weights that are trained, whatever the runner's hooks have put there."""
    with ExitStack() as stack:
        for hook in ema_hooks(hooks):
            stack.enter_context(hook.trained_weights())
        yield
