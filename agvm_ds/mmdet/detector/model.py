"""The detector as mmcv's runner sees it: one train_step is one update of the global batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from mmcv.parallel import MODULE_WRAPPERS, DataContainer
from torch import nn

from agvm_ds.mmdet.detector.losses import parse_losses
from agvm_ds.mmdet.detector.nonfinite import NumberWatch
from agvm_ds.mmdet.process.signals import RankWatch


def to_device(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """A collated batch with its DataContainers opened and its tensors on the device, as mmcv's ``scatter`` does it.

    That one asks torch for a stream in a way that torch 2 no longer has, so it works on a CPU alone.
    """
    return {key: _opened(value, torch.device(device)) for key, value in batch.items()}


def _opened(value: Any, device: torch.device) -> Any:
    if isinstance(value, DataContainer):  # holds a list, an entry for each device of a process: here it has one
        return value.data[0] if value.cpu_only else _opened(value.data[0], device)
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _opened(one, device) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_opened(one, device) for one in value]
    return value


def put_on(detector: nn.Module, device: torch.device | str) -> nn.Module:
    """The detector on a device. mmdet's distillation moves its teacher, which is no submodule, in ``cuda()`` alone."""
    device = torch.device(device)
    return detector.cuda(device) if device.type == "cuda" else detector.to(device)


@MODULE_WRAPPERS.register_module()
class EngineModel(nn.Module):
    """A DeepSpeed engine with the two methods that mmcv's runner calls; ``module`` is the detector.

    stops: hears with an update's losses who was asked to stop. published: a plain detector for the whole weights that are
    evaluated and published; None where nothing is validated.
    """

    engine: Any
    published: Any

    def __init__(
        self, engine: Any, watch: NumberWatch, stops: RankWatch | None = None, published: nn.Module | None = None
    ) -> None:
        super().__init__()
        # Not submodules: the runner and its hooks reach the parameters through ``module`` alone.
        object.__setattr__(self, "engine", engine)
        object.__setattr__(self, "published", published)
        self.module = engine.module
        self.watch = watch
        self.stops = stops
        self.CLASSES = getattr(engine.module, "CLASSES", None)
        # As DDP has it: mmcv's log puts the ranks' memory there before it reduces it. None is the CPU.
        self.output_device = None if torch.device(engine.device).type == "cpu" else engine.device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The detector's own forward."""
        return self.engine(*args, **kwargs)

    def train(self, mode: bool = True) -> EngineModel:
        """Put the engine, and so the detector, in training or evaluation mode."""
        self.training = mode
        self.engine.train(mode)
        return self

    def train_step(self, data: Iterable[Mapping[str, Any]], optimizer: Any = None) -> dict[str, Any]:
        """Forward and backward of each micro-batch and the update; log_vars are means over micro-batches and ranks.

        Raises NonFiniteError where the run is to stop for its numbers; nothing of this update is applied then.
        """
        self.watch.begin()
        outputs = self._update(data)
        self.watch.end(lambda: self._update(data))
        return _merge(outputs)

    def _update(self, data: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        outputs = []
        for batch in data:
            inputs = to_device(batch, self.engine.device)
            losses = self.engine(return_loss=True, **inputs)
            loss, log_vars = parse_losses(self.module, losses, self.stops)
            self.engine.backward(self.watch.checked(loss, log_vars["loss"], losses, inputs["img_metas"]))
            self.engine.step()
            outputs.append(_output(loss, log_vars, inputs))
        return outputs

    def val_step(self, data: Iterable[Mapping[str, Any]], optimizer: Any = None) -> dict[str, Any]:
        """The losses of each micro-batch, of ``published``."""
        outputs = []
        for batch in data:
            inputs = to_device(batch, self.engine.device)
            loss, log_vars = parse_losses(self.module, self.published(return_loss=True, **inputs))
            outputs.append(_output(loss, log_vars, inputs))
        return _merge(outputs)


def _output(loss: torch.Tensor, log_vars: dict[str, float], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a step hands to mmcv."""
    return {"loss": loss.detach(), "log_vars": log_vars, "num_samples": len(inputs["img_metas"])}


def _merge(outputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One mmcv output of several: means of losses and log_vars (a head may leave one out), samples added.

    ``loss``, which some hooks read, is this rank's; log_vars are means over the ranks already.
    """
    keys = dict.fromkeys(key for output in outputs for key in output["log_vars"])
    columns = {key: [o["log_vars"][key] for o in outputs if key in o["log_vars"]] for key in keys}
    log_vars = {key: sum(values) / len(values) for key, values in columns.items()}
    loss = torch.stack([output["loss"] for output in outputs]).mean()
    return {"loss": loss, "log_vars": log_vars, "num_samples": sum(output["num_samples"] for output in outputs)}
