"""A detector's whole weights in float32, gathered from any ZeRO stage, and the ``.pth`` files made of them."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from deepspeed.utils import safe_get_full_fp32_param
from mmcv.runner import load_checkpoint
from torch import nn

from agvm_ds.checkpoints import NotWrittenError, any_pickle, weights_only
from agvm_ds.config import ConfigError
from agvm_ds.mmdet.process.outputs import written_whole
from agvm_ds.shards import masters_beside

StateDict = dict[str, torch.Tensor]

COUNTS = "num_batches_tracked"
"""BatchNorm's, which older checkpoints lack; nothing is computed with it."""


def keep_unrounded(detector: nn.Module) -> StateDict:
    """Copies of what DeepSpeed has no fp32 master of once it casts a detector to half precision.

    Frozen parameters, and buffers, which it casts with ``data_types.buffer_dtype`` alone.
    """
    frozen = {name: parameter for name, parameter in detector.named_parameters() if not parameter.requires_grad}
    buffers = {name: buffer for name, buffer in detector.named_buffers() if buffer.is_floating_point()}
    return {name: value.detach().to("cpu", copy=True) for name, value in (frozen | buffers).items()}


def gather_weights(engine: Any, unrounded: Mapping[str, torch.Tensor] | None = None) -> StateDict:
    """The detector's state dict on every rank, on the CPU; every rank must call it.

    Parameters are the fp32 masters where the training runs in half precision, and what it has not touched is as it was
    before it was cast (``unrounded``, see keep_unrounded). Buffers (BatchNorm's statistics) are rank 0's, as in mmdet's
    distributed evaluation; they are given to the training model of every rank too.
    """
    unrounded = unrounded or {}
    for buffer in engine.module.buffers():
        comm.broadcast(buffer.data, src=0)
    parameters = dict(engine.module.named_parameters(remove_duplicate=False))
    masters = _masters_beside(engine)
    result: StateDict = {}
    for name, value in engine.module.state_dict().items():
        whole = _master(engine, parameters[name], masters) if name in parameters else value
        result[name] = in_float32(whole.detach().cpu(), unrounded.get(name))
    return result


def in_float32(value: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
    """A copy in float32, of integers in their own type. before: what it was rounded from, unless it was trained since."""
    if before is not None and torch.equal(before.to(value.dtype), value):
        value = before
    return value.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)


def _master(engine: Any, parameter: nn.Parameter, masters: Mapping[int, torch.Tensor]) -> torch.Tensor:
    if id(parameter) in masters:
        return masters[id(parameter)]
    if parameter.requires_grad and engine.zero_optimization() and parameter.dtype != torch.float32:
        return safe_get_full_fp32_param(parameter)
    if engine.zero_optimization_partition_weights():
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter


def _masters_beside(engine: Any) -> dict[int, torch.Tensor]:
    """Stage 0 in half precision: DeepSpeed keeps whole fp32 copies beside the parameters."""
    if engine.zero_optimization():
        return {}
    beside = masters_beside(engine.optimizer)
    found = {}
    for parameter in engine.module.parameters():
        if id(parameter) in beside:
            master, start = beside[id(parameter)]
            found[id(parameter)] = master.reshape(-1)[start : start + parameter.numel()].view(parameter.shape)
    return found


def load_weights(
    detector: nn.Module, source: str, logger: Any, trust: bool = False, whole: bool = False
) -> Mapping[str, Any]:
    """Load a ``.pth`` (a file, or a URL that mmcv knows) that fits in part at least; its meta. Raises ConfigError.

    trust: read whatever the file holds; else tensors and plain data alone, so that no code in it is run.
    whole: nothing of the detector may be left as it was.
    """
    try:
        with any_pickle() if trust else weights_only():
            loaded = load_checkpoint(detector, source, map_location="cpu", logger=logger)
    except pickle.UnpicklingError as error:
        held = re.search(r"GLOBAL (\S+)", str(error))
        if trust or held is None:
            raise ConfigError(f"{source}: cannot be loaded as a .pth: {_first_line(error)}") from error
        raise ConfigError(
            f"{source}: holds {held[1]}, and reading that can run code. Only for a file from somebody you trust: "
            "--trust-checkpoint"
        ) from error
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{source}: cannot be loaded as a .pth: {type(error).__name__}: {_first_line(error)}"
        ) from error
    weights = {name.removeprefix("module."): value for name, value in loaded.get("state_dict", loaded).items()}
    wanted = detector.state_dict()
    if not weights.keys() & wanted.keys():
        raise ConfigError(f"{source}: none of its weights has a place in the detector; is it of another one?")
    needed = {name: value for name, value in wanted.items() if not name.endswith(COUNTS)}
    absent = [name for name, value in needed.items() if name not in weights or weights[name].shape != value.shape]
    if whole and absent:
        raise ConfigError(
            f"{source}: {len(absent)} of the detector's {len(needed)} weights are not in it, or have another shape: "
            f"{', '.join(absent[:3])}; is it of another config?"
        )
    return dict(loaded.get("meta") or {})


def put_weights(detector: nn.Module, weights: StateDict, source: Any) -> None:
    """Load a state dict that must fit exactly. Raises ConfigError. source: where it is from."""
    try:
        detector.load_state_dict(weights)
    except RuntimeError as error:
        told = [line.strip() for line in str(error).split("\n")[1:4]]
        raise ConfigError("\n  ".join([f"{source}: is not of this config's detector:", *told])) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def publish(weights: StateDict, meta: Mapping[str, Any], path: Path, link: str | None = None) -> None:
    """Write ``{"meta", "state_dict"}`` as plain mmdet reads it: whole or not at all. link: a symlink's name beside it.

    Raises NotWrittenError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # an out_dir of checkpoint_config
        with written_whole(path) as file:
            torch.save({"meta": dict(meta), "state_dict": weights}, file)
    except (OSError, RuntimeError) as error:
        raise NotWrittenError(
            f"{path} cannot be written: {_first_line(error)}; make room and continue with --resume"
        ) from error
    if link is not None:
        draft_link = path.with_name(f".{link}.tmp")
        draft_link.unlink(missing_ok=True)
        draft_link.symlink_to(path.name)
        os.replace(draft_link, path.with_name(link))
