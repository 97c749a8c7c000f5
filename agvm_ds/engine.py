"""initialize() and attach(): AGVM joined to a DeepSpeed engine, and its state to the engine's checkpoints."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from torch.optim import Optimizer

from agvm_ds.bases import base_from_json, offloads, warning_of
from agvm_ds.config import BLOCK, AGVMConfig, ConfigError, read_block
from agvm_ds.controller import Controller
from agvm_ds.deepspeed_json import load_config, unknown_keys
from agvm_ds.groups import PARAMS, cut_groups
from agvm_ds.health import Health
from agvm_ds.monitor import deepspeed_events
from agvm_ds.optimizer import AGVM
from agvm_ds.scalars import mend_scalars, scalars_sent
from agvm_ds.shards import shards_of
from agvm_ds.support import refuse_by_deepspeed, refuse_configuration, refuse_fp16, refuse_unsupported

logger = logging.getLogger("agvm_ds")

PARTITIONED_WEIGHTS = 3
"""The ZeRO stage that partitions the weights too."""

STATE_KEY = "agvm"
"""Where AGVM's state is in a DeepSpeed checkpoint's client_state."""

_GROUPS_DIFFER = (
    "this run's parameter groups are {}; a checkpoint of a run with other agvm.modules, or without AGVM, has others: "
    "load_optimizer_states=False takes its weights alone"
)


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Iterable[Any] | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` with AGVM in it: same arguments, same four return values; ``engine.agvm`` is set.

    config: a DeepSpeed configuration (dict or path; or ``config_params``, or ``args.deepspeed_config``). With an ``agvm``
    block the ``optimizer`` block names AGVM's base, and the model's parameters (or ``model_parameters``: parameters or
    groups) are cut into modules; without it, or with ``"enabled": false``, this is plain DeepSpeed and ``engine.agvm`` is
    None.
    optimizer: None, or an ``agvm_ds.AGVM`` (any optimizer when AGVM is off).

    Raises ConfigError, before training, for whatever cannot be measured.
    """
    if model is None:
        raise ConfigError("initialize: needs a model")
    args, config = _one_config(args, config, options.pop("config_params", None))
    block = read_block(config)
    # AGVM, and torch's SGD as its baseline, are "untested" for ZeRO; the key only opens a door.
    config.setdefault("zero_allow_untested_optimizer", True)
    if block is not None:
        refuse_configuration(config)
    refuse_by_deepspeed(config)
    refuse_fp16(config)
    if block is not None:
        _refuse_layout(model)
        optimizer = _agvm_optimizer(optimizer, model, model_parameters, block, config)
        model_parameters = None
    with scalars_sent():
        result: tuple[Any, Any, Any, Any] = deepspeed.initialize(
            args=args, model=model, optimizer=optimizer, model_parameters=model_parameters, config=config, **options
        )
    mend_scalars(result[0])
    attach(result[0])
    if (unknown := unknown_keys(config)) and result[0].global_rank == 0:
        logger.warning("the DeepSpeed config has keys that neither DeepSpeed nor AGVM reads: %s", ", ".join(unknown))
    return result


def _one_config(args: Any, config: Any, config_params: Any) -> tuple[Any, dict[str, Any]]:
    named = getattr(args, "deepspeed_config", None)
    config = config if config is not None else config_params  # as DeepSpeed has it
    if (config is None) == (named is None):
        raise ConfigError(
            "initialize: give the DeepSpeed config once, as config, config_params or args.deepspeed_config"
        )
    if named is not None:
        args = copy.copy(args)
        args.deepspeed_config = None
    return args, load_config(config if named is None else named)


def _agvm_optimizer(
    optimizer: Any, model: nn.Module, parameters: Iterable[Any] | None, block: AGVMConfig, config: dict[str, Any]
) -> AGVM:
    if isinstance(optimizer, AGVM):
        return optimizer
    if optimizer is not None:
        raise ConfigError(
            f"initialize: AGVM is on, and the optimizer is {type(optimizer).__name__}: pass agvm_ds.AGVM(groups, base=...)"
        )
    if not config.get("optimizer"):
        raise ConfigError('AGVM needs a base: the DeepSpeed config has no "optimizer" block, and none was passed')
    base, options = base_from_json(config)
    if offloads(config):  # a base that the JSON names is DeepSpeed's own choice, which it does not question
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    given: list[Any] = list(model.parameters()) if parameters is None else list(parameters)
    groups: list[Any] = given if given and isinstance(given[0], Mapping) else [{PARAMS: given}]
    return make_optimizer(cut_groups(groups, model, block.modules), base, options)


def _refuse_layout(model: nn.Module) -> None:
    """DeepSpeed 0.19 sends rank 0's parameters as bytes, which stops in the middle of a start for any other layout."""
    named = [name for name, p in model.named_parameters() if not p.is_contiguous()]
    if named:
        raise ConfigError(
            f"AGVM cannot start: parameter {named[0]} ({len(named)} in all) is not contiguous, and DeepSpeed cannot "
            "broadcast it: set parameter.data = parameter.data.contiguous() before"
        )


def make_optimizer(groups: list[dict[str, Any]], base: type[Optimizer], options: Mapping[str, Any]) -> AGVM:
    """AGVM over ``base``; an argument that the base does not take is a ConfigError."""
    try:
        return AGVM(groups, base=base, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer.params: {error}") from None


def attach(engine: Any) -> None:
    """Set ``engine.agvm`` and join AGVM to the engine's step and checkpoints. A second call does nothing.

    Reads the ``agvm`` block of the config that the engine was started with; without one, or with
    ``"enabled": false``, ``engine.agvm`` is None and an AGVM optimizer steps as its base. Raises ConfigError when the
    client optimizer is not an ``agvm_ds.AGVM``, or for whatever cannot be measured exactly.
    """
    if "agvm" in vars(engine):
        return
    optimizer, block = engine.basic_optimizer, read_block(engine._config._param_dict)
    if block is not None and not isinstance(optimizer, AGVM):
        raise ConfigError(
            f"agvm_ds.attach: the engine's client optimizer is {type(optimizer).__name__}; it must be an agvm_ds.AGVM"
        )
    if block is not None:
        optimizer.drop_untrained()
        refuse_unsupported(engine, block, optimizer)
    elif isinstance(optimizer, AGVM) and BLOCK not in engine._config._param_dict and engine.global_rank == 0:
        logger.warning("AGVM is off: the DeepSpeed config has no agvm block, so the AGVM optimizer steps as its base")
    engine.agvm = None if block is None else _controller(engine, optimizer, block)
    if isinstance(optimizer, AGVM):
        optimizer.attached = True


def _controller(engine: Any, optimizer: AGVM, block: AGVMConfig) -> Controller:
    if engine.global_steps:
        raise ConfigError(
            f"agvm_ds.attach: the engine is at update {engine.global_steps} already: attach before load_checkpoint, which "
            "then brings the scale factors"
        )
    _restore_optimizer(engine, optimizer)
    if (warning := warning_of(optimizer.base, int(engine.zero_optimization_stage()))) and engine.global_rank == 0:
        logger.warning("AGVM: %s", warning)
    controller = Controller(block, optimizer, shards_of(engine, optimizer))
    if engine.global_rank == 0:
        controller.listeners.append(Health(controller))
    if engine.monitor.enabled and engine.global_rank == 0:
        controller.listeners.append(deepspeed_events(controller))
    _join_backward(engine, controller)
    _join_destroy(engine, controller)
    _join_step(engine, controller)
    _join_checkpoints(engine, controller)
    return controller


def _restore_optimizer(engine: Any, optimizer: AGVM) -> None:
    """ZeRO puts an Adagrad of its own, with one group, in the place of any Adagrad: put AGVM back."""
    zero = engine.optimizer
    if zero is optimizer or zero.optimizer is optimizer:
        return
    zero.optimizer = optimizer
    if engine.zero_optimization_stage() < PARTITIONED_WEIGHTS:  # these were made of the one group
        zero._link_all_hp_params()
        zero._param_slice_mappings = zero._create_param_mapping()
        if zero.cpu_offload:
            zero._create_optimizer_mapping()


def _join_backward(engine: Any, controller: Controller) -> None:
    """A micro-batch ends with its backward, before DeepSpeed reduces what is left."""
    backward, epilogue = engine.backward, engine._backward_epilogue

    @wraps(backward)
    def backward_or_break_off(*args: Any, **kwargs: Any) -> Any:
        try:
            return backward(*args, **kwargs)
        except Exception:
            controller.break_off()
            raise

    @wraps(epilogue)
    def backward_epilogue(*args: Any, **kwargs: Any) -> None:
        controller.end_micro_batch()
        epilogue(*args, **kwargs)

    engine.backward, engine._backward_epilogue = backward_or_break_off, backward_epilogue


def _join_destroy(engine: Any, controller: Controller) -> None:
    destroy = engine.destroy

    @wraps(destroy)
    def destroyed() -> None:
        controller.let_go()
        destroy()

    engine.destroy = destroyed


def _join_step(engine: Any, controller: Controller) -> None:
    """Measure and modulate around the engine's step: after gradients are averaged, before stage 0 clips them."""
    take_step = engine._take_model_step
    max_norm = float(engine.gradient_clipping() or 0.0)

    @wraps(take_step)
    def step(*args: Any, **kwargs: Any) -> None:
        t = int(engine.global_steps)
        measure = controller.measure(t)
        # Written afresh in every update: loading a checkpoint brings the clip value of its run.
        controller.shards.set_clipping(max_norm if controller.config.clips(t) else 0.0)
        with controller.modulation(t, measure):
            take_step(*args, **kwargs)
        controller.finish(t, measure if engine.was_step_applied() else None)

    engine._take_model_step = step


def _join_checkpoints(engine: Any, controller: Controller) -> None:
    """AGVM's state goes with the client_state of every DeepSpeed checkpoint, and comes back after every load."""
    save, load = engine.save_checkpoint, engine.load_checkpoint

    @wraps(save)
    def save_checkpoint(save_dir: Any, tag: Any = None, client_state: Any = None, *args: Any, **kwargs: Any) -> Any:
        state = {**(client_state or {}), STATE_KEY: controller.state_dict()}
        return save(save_dir, tag, state, *args, **kwargs)

    @wraps(load)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        asked = signature(load).bind(*args, **kwargs)
        asked.apply_defaults()
        whole = asked.arguments["load_optimizer_states"] and not asked.arguments["load_module_only"]
        try:
            path, client_state = load(*args, **kwargs)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"{error}\n  {_GROUPS_DIFFER.format(controller.groups)}") from error
        if path is not None:
            if whole:
                _part_counts(engine.basic_optimizer)
                _restore(engine, controller, client_state or {})
            controller.resume_at(int(engine.global_steps))
        return path, client_state

    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint


def _part_counts(optimizer: AGVM) -> None:
    """Stage 3's universal load gives all buffers one step count, the same tensor, which torch counts up once a buffer."""
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() == 0:
                state[key] = value.clone()


def _restore(engine: Any, controller: Controller, client_state: Mapping[str, Any]) -> None:
    if STATE_KEY in client_state:
        for note in controller.load_state_dict(client_state[STATE_KEY]):
            if engine.global_rank == 0:
                logger.warning("AGVM: %s", note)
    elif engine.global_rank == 0:
        logger.warning("AGVM: the checkpoint has no AGVM state: scale factors start at 1")
