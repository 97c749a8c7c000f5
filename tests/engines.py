"""Engines over the toy model: one way to configure, train and read them, for every test that starts ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import nn

import agvm_ds
from tests.toy import Toy, micro_batch

ROWS = 4
"""Images in a micro-batch."""

OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "AdamW": {"lr": 0.003, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1},
}
"""Arguments of the bases, none of them at its default."""

AGVM_BLOCK: dict[str, Any] = {"interval": 2, "start_step": 1, "ema_decay": 0.9, "precondition": "none"}
"""Measures updates 2, 4, 6, ...; moves the scale factors far enough to be seen within a few updates."""


def ds_config(
    stage: int, accumulation: int, base: str = "SGD", agvm: Mapping[str, Any] | None = AGVM_BLOCK, **more: Any
) -> dict[str, Any]:
    """A DeepSpeed configuration. Clipping is off unless asked for: without the key DeepSpeed 0.19 clips to norm 1."""
    params = OPTIONS[base] | ({"torch_adam": True} if base == "AdamW" else {})
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": base, "params": params},
        "zero_optimization": {"stage": stage},
        **more,
    }
    return config if agvm is None else config | {"agvm": dict(agvm)}


@contextmanager
def started(config: Mapping[str, Any], model: nn.Module | None = None, **options: Any) -> Iterator[Any]:
    """An engine of ``agvm_ds.initialize``, taken down at the end so that the process can build the next."""
    engine = agvm_ds.initialize(model=Toy() if model is None else model, config=config, **options)[0]
    try:
        yield engine
    finally:
        engine.destroy()


def backward(engine: Any, t: int, k: int, scale: float = 1.0, torch_backward: bool = False) -> float:
    """Forward and backward of this rank's k-th micro-batch of update t, by the engine or in torch's way; its loss."""
    accumulation = engine.gradient_accumulation_steps()
    x, y = micro_batch(t, engine.global_rank * accumulation + k, ROWS)
    loss = engine(x, y) * scale
    if torch_backward:
        engine.scale(loss).backward()
    else:
        engine.backward(loss)
    return loss.item()


def update(engine: Any, t: int, torch_backward: bool = False, scale: float = 1.0) -> list[float]:
    """One update of the global batch; this rank's losses."""
    losses = []
    for k in range(engine.gradient_accumulation_steps()):
        losses.append(backward(engine, t, k, scale, torch_backward))
        engine.step()
    return losses


def parameters(engine: Any) -> dict[str, torch.Tensor]:
    """name -> what the model computes with, gathered under stage 3."""
    named = dict(engine.module.named_parameters())
    gathered = [p for p in named.values() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(gathered, enabled=bool(gathered)):
        return {name: p.detach().clone() for name, p in named.items()}


def masters(engine: Any) -> dict[str, torch.Tensor]:
    """name -> the fp32 values that the optimizer steps; frozen parameters as they are.

    In fp32 the model's own are the same, and right with ``round_robin_gradients``, where DeepSpeed's look-up is not.
    """
    found = parameters(engine)
    if not (engine.bfloat16_enabled() or engine.fp16_enabled()):
        return found
    if engine.zero_optimization_stage():
        for name, p in engine.module.named_parameters():
            if p.requires_grad:
                found[name] = deepspeed.utils.safe_get_full_fp32_param(p).clone()
    else:
        names = {id(p): name for name, p in engine.module.named_parameters()}
        if hasattr(engine.optimizer, "fp32_groups_flat"):  # with a fused Adam
            for halves, flat in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups_flat, strict=True):
                parts = flat.detach().split([p.numel() for p in halves])
                found |= {names[id(p)]: part.view(p.shape).clone() for p, part in zip(halves, parts, strict=True)}
            return found
        for halves, fulls in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
            found |= {names[id(p)]: full.detach().clone() for p, full in zip(halves, fulls, strict=True)}
    return found


@dataclass
class Record:
    """What one rank sees after one update."""

    scale_factors: dict[str, float]
    variances: dict[str, float]
    noise_scales: dict[str, float]
    rates: dict[str, float]
    parameters: dict[str, torch.Tensor]
    steps: int
    measured: int


def record(engine: Any) -> Record:
    """The state after an update, AGVM's and the model's."""
    agvm = engine.agvm
    return Record(
        dict(agvm.scale_factors),
        dict(agvm.variances),
        dict(agvm.noise_scales),
        {name: float(rate) for name, rate in agvm.optimizer.rates.items()},
        {name: value.cpu() for name, value in masters(engine).items()},
        agvm.steps,
        agvm.measured,
    )


def train(engine: Any, updates: Iterable[int]) -> list[Record]:
    """Updates, and what is seen after each."""
    records = []
    for t in updates:
        update(engine, t)
        records.append(record(engine))
    return records


@contextmanager
def heard() -> Iterator[list[str]]:
    """What is logged of AGVM."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda entry: messages.append(entry.getMessage())  # type: ignore[method-assign]
    logging.getLogger("agvm_ds").addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger("agvm_ds").removeHandler(handler)


def identical(one: Any, other: Any) -> bool:
    """Whether two results of ranks are the same bit for bit; nan is nan."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, Record):
        return identical(vars(one), vars(other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(identical(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(identical, one, other))
    return repr(one) == repr(other)
