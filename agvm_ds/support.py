"""What AGVM refuses at start, and why: statistics that would be wrong, or that nobody has tried, are never given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agvm_ds.config import AGVMConfig, ConfigError
from agvm_ds.optimizer import AGVM, BASES


def _offloads(engine: Any) -> bool:
    devices = [config.device for config in (engine.zero_offload_optimizer(), engine.zero_offload_param()) if config]
    return any(str(getattr(device, "value", device)) != "none" for device in devices)


def _bf16_fp32_accumulation(engine: Any) -> bool:
    return bool(type(engine.optimizer).__name__ == "BF16_Optimizer")


def _parallel(engine: Any) -> bool:
    return bool(engine.pipeline_parallelism or engine.sequence_parallel_size > 1 or engine.autotp_size() > 1)


REFUSED: list[tuple[Callable[[Any], Any], str]] = [
    (_offloads, "zero_optimization.offload_optimizer / offload_param: gradients then lie elsewhere"),
    (_bf16_fp32_accumulation, "bf16 with fp32 gradient accumulation in ZeRO stage 1: gradients then lie elsewhere"),
    (lambda e: not e.managed_gradient_accumulation(), "managed_gradient_accumulation: false (n is not known)"),
    (_parallel, "pipeline, sequence or tensor parallelism"),
    (lambda e: e.has_moe_layers, "mixture-of-experts layers"),
    (lambda e: e.zero_elastic_checkpoint(), "zero_optimization.elastic_checkpoint (torch's optimizers have no step)"),
    (lambda e: e.zenflow, "zero_optimization.zenflow"),
    (lambda e: e.is_deepcompile_enabled(), "compile.deepcompile"),
    (lambda e: e.zero_quantized_gradients(), "zero_optimization.zero_quantized_gradients"),
    (lambda e: e.zero_hpz_partition_size() > 1, "zero_optimization.zero_hpz_partition_size > 1"),
    (lambda e: e.torch_autocast_enabled(), "torch_autocast"),
]
"""(question to the engine, what is refused)."""


def refuse_unsupported(engine: Any, config: AGVMConfig, optimizer: AGVM) -> None:
    """Raise ConfigError with everything in this engine that AGVM cannot measure exactly, all together."""
    problems = [f"{what}: not supported with AGVM" for asked, what in REFUSED if asked(engine)]
    problems += _optimizer_problems(config, optimizer)
    problems += _module_problems(engine, config, optimizer)
    n = engine.dp_world_size * engine.gradient_accumulation_steps()
    if n < 2:
        problems.append(
            f"an update has n = {n} micro-batch (1 data-parallel rank x 1 accumulation step), and the gradient variance "
            "needs at least 2: use more ranks, or a smaller train_micro_batch_size_per_gpu at the same train_batch_size"
        )
    if problems:
        raise ConfigError("\n  ".join(["AGVM cannot start:", *problems]))


def _optimizer_problems(config: AGVMConfig, optimizer: AGVM) -> list[str]:
    if optimizer.base not in BASES.values():
        return [f"base optimizer {optimizer.base.__name__}: not supported with AGVM; allowed: {', '.join(BASES)}"]
    if config.precondition == "auto" and issubclass(optimizer.base, BASES["AdamW"]):
        return [
            f'agvm.precondition = "auto" with {optimizer.base.__name__}: the variance of the preconditioned gradient is '
            'not available in this version; allowed: "none" (the variance of the gradient itself)'
        ]
    return []


def _module_problems(engine: Any, config: AGVMConfig, optimizer: AGVM) -> list[str]:
    if config.anchor in optimizer.modules:
        return []
    known = f"allowed: {', '.join(optimizer.modules)}"
    inside = [p for name, p in engine.module.named_parameters() if name.startswith(f"{config.anchor}.")]
    if inside and not any(p.requires_grad for p in inside):
        return [f"agvm.anchor = {config.anchor!r}: all its parameters are frozen; {known}"]
    return [f"agvm.anchor = {config.anchor!r}: no module of that name is trained; {known}"]
