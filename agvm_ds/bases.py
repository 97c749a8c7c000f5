"""The optimizers that AGVM may stand on: how a DeepSpeed JSON names them, and which cannot be modulated exactly.

Under ZeRO a base steps flat partitions of its parameters, so it must treat each element by itself; and its step must
follow the learning rate, which is what AGVM modulates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from torch.optim import Optimizer

from agvm_ds.config import ConfigError

ADAMS: tuple[type[Optimizer], ...] = (torch.optim.Adam, torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam)
"""Whose variance is that of the preconditioned gradient, g / (sqrt(v) + eps)."""

_TORCH = ("SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop")
ELEMENTWISE: tuple[type[Optimizer], ...] = (
    *(getattr(torch.optim, name) for name in _TORCH),
    *(FusedAdam, DeepSpeedCPUAdam, DeepSpeedCPUAdagrad, DeepSpeedCPULion, FusedLion),
)
"""Known to treat each element by itself."""

_MATRICES = "its update is made of whole matrices, which ZeRO cuts"
_COMPRESSED = "it averages compressed momenta itself, so that no averaged gradient exists to measure"
REFUSED: dict[str, str] = {
    "LBFGS": "it needs the loss again, and inner products over all parameters",
    "SparseAdam": "it takes sparse gradients only",
    "Adafactor": _MATRICES,
    "Muon": _MATRICES,
    "Rprop": "its step sizes do not follow the learning rate",
    "OneBitAdam": _COMPRESSED,
    "ZeroOneAdam": _COMPRESSED,
    "OneBitLamb": _COMPRESSED,
}
"""Name -> why it cannot stand under AGVM."""

NORMS_BY_SHARD = "its norms are those of a rank's shard of a parameter group, as under plain DeepSpeed's ZeRO"


def preconditioned(base: type[Optimizer]) -> bool:
    """Whether ``precondition: "auto"`` measures the preconditioned gradient with this base."""
    return issubclass(base, ADAMS)


def problem_of(base: type[Optimizer]) -> str | None:
    """Why a base is refused; None when it is not."""
    reason = REFUSED.get(base.__name__)
    return None if reason is None else f"base optimizer {base.__name__}: not supported with AGVM: {reason}"


def warning_of(base: type[Optimizer], zero_stage: int) -> str | None:
    """What the log should say about a base that is accepted."""
    if issubclass(base, FusedLamb):
        return f"base optimizer {base.__name__}: {NORMS_BY_SHARD}" if zero_stage else None
    if issubclass(base, ELEMENTWISE):
        return None
    return f"base optimizer {base.__name__} is not known here: under ZeRO it must treat each element by itself"


def base_from_json(config: Mapping[str, Any]) -> tuple[type[Optimizer], dict[str, Any]]:
    """(base class, its arguments) for a DeepSpeed configuration's ``optimizer`` block: what DeepSpeed would build of it.

    As in DeepSpeed, "Adam" is AdamW unless ``adam_w_mode`` is false, and is DeepSpeed's own Adam (on a CPU without offload:
    torch's, which needs no compiler) unless ``torch_adam`` is true. Any other name is a class of ``torch.optim``.
    Raises ConfigError for a name that is not known, or refused under AGVM.
    """
    block = config["optimizer"]
    name, params = str(block.get("type")), dict(block.get("params") or {})
    if "max_grad_norm" in params:
        raise ConfigError("optimizer.params.max_grad_norm: DeepSpeed's key for this is gradient_clipping")
    refused = {key.lower(): key for key in REFUSED}
    if name.lower() in refused:
        key = refused[name.lower()]
        raise ConfigError(f"optimizer.type = {name!r}: not supported with AGVM: {REFUSED[key]}")
    offload = offloads(config)
    if name.lower() in ("adam", "adamw"):
        base, more = _adam(name.lower(), params, offload)
        return base, {**params, **more}
    if name.lower() in _DEEPSPEED:
        return _DEEPSPEED[name.lower()][offload], params
    known = {key.lower(): key for key in _TORCH}
    if name.lower() not in known:
        names = sorted({*_TORCH, "Lamb", "Lion"})
        raise ConfigError(f"optimizer.type = {name!r}: not known; allowed: {', '.join(names)}")
    return getattr(torch.optim, known[name.lower()]), params


def offloads(config: Mapping[str, Any]) -> bool:
    """Whether a DeepSpeed configuration keeps the optimizer in the host's memory (ZeRO-Offload)."""
    zero = config.get("zero_optimization") or {}
    return ((zero.get("offload_optimizer") or {}).get("device") or "none") != "none"


_DEEPSPEED: dict[str, tuple[type[Optimizer], type[Optimizer]]] = {
    "adagrad": (torch.optim.Adagrad, DeepSpeedCPUAdagrad),
    "lion": (FusedLion, DeepSpeedCPULion),
    "lamb": (FusedLamb, FusedLamb),
}
"""Name -> what DeepSpeed builds of it, without ZeRO-Offload and with it."""


def _adam(name: str, params: dict[str, Any], offload: bool) -> tuple[type[Optimizer], dict[str, Any]]:
    """The Adam of a name, and arguments to add to ``params``, out of which the keys that only choose are taken."""
    decoupled = bool(params.pop("adam_w_mode", True)) or name == "adamw"
    plain = torch.optim.AdamW if decoupled else torch.optim.Adam
    states = params.pop("fp32_optimizer_states", None)
    if params.pop("torch_adam", False):
        return plain, {}
    if offload:
        return DeepSpeedCPUAdam, {"adamw_mode": decoupled} | (
            {} if states is None else {"fp32_optimizer_states": states}
        )
    if get_accelerator().device_name() == "cpu" and params.get("bias_correction", True):
        params.pop("bias_correction", None)
        return plain, {"weight_decay": params.get("weight_decay", 0.0)}  # torch's AdamW has a default of its own
    return FusedAdam, {"adam_w_mode": decoupled}
