"""What AGVM refuses at start, and why: statistics that would be wrong, or that nobody has tried, are never given."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum
from pydantic import ValidationError

from agvm_ds.bases import problem_of
from agvm_ds.config import AGVMConfig, ConfigError
from agvm_ds.deepspeed_json import BATCH_KEYS
from agvm_ds.optimizer import AGVM


@dataclass(frozen=True)
class Refusal:
    """A value of a DeepSpeed configuration that AGVM does not work with."""

    path: str
    """Dotted keys."""
    why: str
    refused: Callable[[Any], bool] = bool
    """Of the value, when the configuration has one."""

    def problem(self, config: Mapping[str, Any]) -> str | None:
        """What to tell, None when the configuration is fine."""
        value: Any = config
        for key in self.path.split("."):
            if not isinstance(value, Mapping) or value.get(key) is None:
                return None
            value = value[key]
        return f"{self.path} = {value!r}: not supported with AGVM: {self.why}" if self.refused(value) else None


def _above_one(value: Any) -> bool:
    return bool(value > 1)


_ZERO = "zero_optimization"
_QUANTIZED = "the gradients that are averaged are not the micro-gradients'"
_CPU_ADAM = "DeepSpeed wants its CPU Adam itself there, not a client optimizer"
_ELSEWHERE = "gradients and optimizer state are then on disk, or with another optimizer"

REFUSED = [
    Refusal("managed_gradient_accumulation", "n is not known before the update ends", lambda v: not v),
    Refusal(
        "gradient_allreduce_op",
        "the gradient is then no mean of the micro-gradients",
        lambda v: str(v).lower() != "mean",
    ),
    Refusal("sparse_gradients", "sparse gradients have no place in a shard"),
    Refusal(f"{_ZERO}.elastic_checkpoint", 'it wants a "step" in the parameter groups, which torch\'s optimizers lack'),
    Refusal(f"{_ZERO}.zenflow", "it steps a part of the gradient, with other optimizers", lambda v: True),
    Refusal(f"{_ZERO}.zero_quantized_gradients", _QUANTIZED),
    Refusal(f"{_ZERO}.zeropp_loco_param", _QUANTIZED, lambda v: True),
    Refusal(f"{_ZERO}.zero_hpz_partition_size", "weights are then partitioned twice; not tried", _above_one),
    Refusal(f"{_ZERO}.mics_shard_size", "shards are then those of a part of the ranks", lambda v: v > 0),
    Refusal(f"{_ZERO}.offload_optimizer.device", _ELSEWHERE, lambda v: v == "nvme"),
    Refusal(f"{_ZERO}.offload_optimizer.ratio", _ELSEWHERE, lambda v: v != 1),
    Refusal(f"{_ZERO}.offload_optimizer.super_offload", _ELSEWHERE),
    Refusal(f"{_ZERO}.offload_param.device", "parameters on disk were not tried", lambda v: v == "nvme"),
    Refusal("bf16.bf16_master_weights_and_grads", _CPU_ADAM),
    Refusal("bf16.bf16_optimizer_states", _CPU_ADAM),
    Refusal("fp16.fp16_master_weights_and_grads", _CPU_ADAM),
    Refusal("compile.deepcompile", "its compiled backward reduces gradients in its own way"),
    Refusal("tensor_parallel.autotp_size", "tensor parallelism was not tried", _above_one),
    Refusal("sequence_parallel_size", "sequence parallelism was not tried", _above_one),
]
"""Looked up in the configuration before DeepSpeed starts."""


def refuse_by_deepspeed(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for what DeepSpeed's own reading of a configuration refuses, before anything is built.

    Batch sizes are left out: they depend on the number of ranks.
    """
    rest = {key: value for key, value in config.items() if key not in BATCH_KEYS}
    try:
        DeepSpeedConfig(copy.deepcopy({**rest, "train_micro_batch_size_per_gpu": 1}))
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors()]
        raise ConfigError("\n  ".join([f"DeepSpeed refuses its config ({error.title}):", *wrong])) from None
    except Exception as error:  # DeepSpeed checks with asserts, and takes values apart without looking
        raise ConfigError(f"DeepSpeed refuses its config: {type(error).__name__}: {error}") from error
    _refuse_scheduler(config.get("scheduler") or {})


def refuse_fp16(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for float16 where DeepSpeed 0.19's loss scale is not to be relied on."""
    if problems := _fp16_problems(config):
        raise ConfigError(problems[0])


def _fp16_problems(config: Mapping[str, Any]) -> list[str]:
    """DeepSpeed 0.19 scales the loss of fp16 for its ZeRO optimizers alone, and unscales the gradient in stage 0 too.

    torch's scaler lowers the scale in ``update``, which ZeRO calls once a flat buffer, and not after an overflow.
    """
    fp16, autocast = config.get("fp16") or {}, config.get("torch_autocast") or {}
    stage = (config.get("zero_optimization") or {}).get("stage", 0)
    if fp16.get("enabled") and not stage:
        return [
            "fp16.enabled in ZeRO stage 0: DeepSpeed 0.19 divides the gradient by a loss scale by which it has not "
            "multiplied the loss, so that nothing is trained: use stage 1"
        ]
    if autocast.get("enabled") and autocast.get("dtype") is None:
        return [
            "torch_autocast.dtype: is missing: torch then takes float16 on a GPU, for which DeepSpeed 0.19 has no loss "
            'scale: write "bfloat16"'
        ]
    if autocast.get("enabled") and stage and DtypeEnum(autocast["dtype"]).value == torch.float16:
        return [
            f"torch_autocast.dtype = {autocast['dtype']!r} in ZeRO stage {stage}: DeepSpeed 0.19 does not lower its loss "
            "scale after an overflow, so that one that lasts ends the training unseen: use bfloat16, or fp16.enabled"
        ]
    return []


def _refuse_scheduler(block: Mapping[str, Any]) -> None:
    """DeepSpeed looks for it in its own module, then in torch's, when all else has been built."""
    name = block.get("type")
    kind = getattr(lr_schedules, str(name), None) or getattr(torch.optim.lr_scheduler, str(name), None)
    if name is not None and kind is None:
        near = difflib.get_close_matches(name, lr_schedules.VALID_LR_SCHEDULES, 1)
        hint = f"did you mean {near[0]}?" if near else f"DeepSpeed has {', '.join(lr_schedules.VALID_LR_SCHEDULES)}"
        raise ConfigError(f"scheduler.type = {name!r}: not known; {hint}")
    if kind is None:
        return
    params = block.get("params") or {}
    try:
        signature(kind).bind(None, **params)
        if not any(isinstance(value, list) for value in params.values()):  # which would be a value for each group
            kind(torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))]), **params)
    except Exception as error:  # asserts, and values taken apart without looking, as above
        raise ConfigError(f"scheduler.params of {name}: {error}") from None


def refuse_configuration(config: Mapping[str, Any]) -> None:
    """Raise ConfigError with everything in a DeepSpeed configuration that AGVM cannot work with, all together."""
    _raise(_configuration_problems(config))


def refuse_unsupported(engine: Any, config: AGVMConfig, optimizer: AGVM) -> None:
    """Raise ConfigError with everything in this engine that AGVM cannot measure exactly, all together."""
    problems = _configuration_problems(engine._config._param_dict) + _fp16_problems(engine._config._param_dict)
    problems += _model_problems(engine, config, optimizer)
    if problem := problem_of(optimizer.base):
        problems.append(problem)
    n = engine.dp_world_size * engine.gradient_accumulation_steps()
    if n < 2:
        problems.append(
            f"an update has n = {n} micro-batch (1 data-parallel rank x 1 accumulation step), and the gradient variance "
            "needs at least 2: use more ranks, or a smaller train_micro_batch_size_per_gpu at the same train_batch_size"
        )
    _raise(problems)


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError("\n  ".join(["AGVM cannot start:", *problems]))


def _configuration_problems(config: Mapping[str, Any]) -> list[str]:
    return [problem for refusal in REFUSED if (problem := refusal.problem(config))]


def _model_problems(engine: Any, config: AGVMConfig, optimizer: AGVM) -> list[str]:
    problems = []
    if engine.pipeline_parallelism or engine.sequence_parallel_size > 1 or engine.mp_world_size > 1:
        problems.append("pipeline, sequence or tensor parallelism: not supported with AGVM: not tried")
    if engine.has_moe_layers:
        problems.append("mixture-of-experts layers: not supported with AGVM: experts are averaged over other ranks")
    if any(isinstance(module, SPARSE) and module.sparse for module in engine.module.modules()):
        problems.append(
            "an embedding with sparse=True: not supported with AGVM: sparse gradients have no place in a shard"
        )
    if _divided_only(engine):
        problems.append(
            f"gradient_predivide_factor = {engine.gradient_predivide_factor()} in stage 3 without reduce_scatter: DeepSpeed "
            "0.19 divides by it, and does not multiply back when it is the number of ranks"
        )
    if config.anchor not in optimizer.modules:
        problems.append(_anchor_problem(engine, config.anchor, optimizer.modules))
    return problems


SPARSE = (torch.nn.Embedding, torch.nn.EmbeddingBag)


def _divided_only(engine: Any) -> bool:
    factor, ranks = float(engine.gradient_predivide_factor()), engine.dp_world_size
    stage = int(engine.zero_optimization_stage())
    return stage == 3 and factor == ranks != 1 and engine.postscale_gradients() and not engine.zero_reduce_scatter()


def _anchor_problem(engine: Any, anchor: str, modules: list[str]) -> str:
    inside = [p for name, p in engine.module.named_parameters() if name.startswith(f"{anchor}.")]
    frozen = bool(inside) and not any(p.requires_grad for p in inside)
    why = "all its parameters are frozen" if frozen else "no module of that name is trained"
    return f"agvm.anchor = {anchor!r}: {why}; allowed: {', '.join(modules)}"
