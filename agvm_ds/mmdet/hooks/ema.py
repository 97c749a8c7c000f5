"""mmcv's and mmdet's hooks of averaged weights (YOLOX has one), under DeepSpeed: each rank averages the fp32 weights it owns.

The hooks swap the averages into the model between epochs. Here the model stays as it is trained, cut over the ranks or
rounded; the averages lie beside the fp32 masters, an update costs no communication, and they are put together when they are
evaluated, published or saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from deepspeed import comm
from mmcv.runner import HOOKS
from mmcv.runner.hooks import EMAHook
from mmdet.core.hook import ExpMomentumEMAHook, LinearMomentumEMAHook

from agvm_ds.mmdet.detector.weights import StateDict
from agvm_ds.mmdet.evaluate import broadcast_object
from agvm_ds.shards import cut, gathered, shards_of


class EngineEMA:
    """Mixed in before one of these hooks: when and with what momentum is its rule, what is averaged is said here.

    Its rule goes over ``model_parameters``: every flat buffer's fp32 masters, as far as this rank owns them, by the
    buffer's index; and unless it skips them the detector's buffers (BatchNorm's statistics), by name.
    """

    skip_buffers: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.in_use = False
        """Between epochs: the averages are what is evaluated and published."""
        self.model_buffers: dict[str, torch.Tensor] = {}
        """The averages: fp32, where the weights are, under the same keys."""
        self.param_ema_buffer: dict[str, str] = {}

    @property
    def model_parameters(self) -> dict[str, torch.Tensor]:
        """What is averaged."""
        masters = {str(index): master for index, master in enumerate(self._shards.masters())}
        return masters if self.skip_buffers else masters | self._buffers()

    def _buffers(self) -> dict[str, torch.Tensor]:
        module = self._shards.engine.module
        parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        return {name: value for name, value in module.state_dict().items() if name not in parameters}

    def before_run(self, runner: Any) -> None:
        """Begin with the weights as they are, unless a resume has brought averages."""
        if not self.model_buffers:
            self._start(runner)

    def _start(self, runner: Any) -> None:
        self._placed = runner.saving.placed
        self._shards = shards_of(runner.engine, self._placed)  # type: ignore[arg-type]
        self.model_buffers = {key: _fp32_copy(value) for key, value in self.model_parameters.items()}
        self.param_ema_buffer = {key: key for key in self.model_buffers}

    def before_train_epoch(self, runner: Any) -> None:
        """What is saved within an epoch is published as it is trained."""
        self.in_use = False

    def after_train_epoch(self, runner: Any) -> None:
        """The averages are evaluated and published."""
        self.in_use = True

    def averages(self) -> StateDict:
        """All of them by parameter and buffer, whole, on the CPU; every rank must call it. Buffers' are rank 0's."""
        owned, module = self._placed.owned, self._shards.engine.module
        whole = {
            id(item.parameter): flat.view(getattr(item.parameter, "ds_shape", item.parameter.shape)).cpu()
            for item, flat in zip(owned, gathered(self._shards, self._owned()), strict=True)
        }
        named = module.named_parameters(remove_duplicate=False)
        found = {name: whole[id(parameter)] for name, parameter in named if id(parameter) in whole}
        for name in [] if self.skip_buffers else self._buffers():
            comm.broadcast(self.model_buffers[name], src=0)
            found[name] = self.model_buffers[name].to("cpu", copy=True)
        return found

    def _owned(self) -> list[torch.Tensor]:
        return [self.model_buffers[str(index)] for index in range(len(self._shards.masters()))]

    def take(self, runner: Any, averages: StateDict) -> None:
        """Go on from a checkpoint's, which rank 0 has; every rank must call it. What is not among them begins anew."""
        self._start(runner)
        averages = broadcast_object(averages)
        cut(self._shards, map(averages.get, self._placed.names), self._owned())
        for name in self.model_buffers.keys() & averages.keys():
            self.model_buffers[name].copy_(averages[name])


def _fp32_copy(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)


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


def ema_hooks(hooks: Iterable[Any]) -> list[EngineEMA]:
    """Those of a runner's hooks that average weights."""
    return [hook for hook in hooks if isinstance(hook, EngineEMA)]


def use_averages(weights: StateDict, hooks: Iterable[Any], unrounded: Mapping[str, torch.Tensor]) -> StateDict:
    """What is evaluated and published: whole ``weights`` with the averages that are in use now in their place.

    Every rank must call it. unrounded: see ``replaced``.
    """
    for hook in ema_hooks(hooks):
        weights = replaced(weights, hook.averages() if hook.in_use else {}, unrounded)
    return weights


def replaced(weights: StateDict, averages: StateDict, unrounded: Mapping[str, torch.Tensor]) -> StateDict:
    """Weights with averages in their place; what no update has changed stays as it was before it was cast (``unrounded``)."""
    unchanged = {name for name in averages if name in unrounded and torch.equal(weights[name], unrounded[name])}
    return weights | {name: average for name, average in averages.items() if name not in unchanged}
