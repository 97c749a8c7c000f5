"""``launch/train.py --dry-run``: all is built and one update made; what the run would be is printed, nothing written."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed import comm
from mmcv import Config
from mmcv.runner.hooks.lr_updater import LrUpdaterHook
from rich.console import Console
from rich.table import Table
from torch import nn

from agvm_ds.groups import PARAMS, Group
from agvm_ds.mmdet.plan import Plan
from agvm_ds.mmdet.planning.memory import GIB, footprint, moments_of, needs
from agvm_ds.mmdet.progress import waiting

REHEARSED = "dry run: no work dir was made"
"""How the last line of a dry run that went through begins."""
MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")
"""Blocks of a DeepSpeed JSON whose writers make their files at once."""
MILESTONES = 5
"""Updates whose learning rate is shown, beside the end of the warm-up and where the rate steps."""


def without_monitors(deepspeed: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run that writes nothing."""
    return {key: value for key, value in deepspeed.items() if key not in MONITORS}


def rehearse(cfg: Config, plan: Plan, runner: Any, loader: Any, modules: list[tuple[str, ...]], updates: int) -> None:
    """Make the first update, and print on rank 0 what the run would be; every rank must call it.

    modules: ``module_rows``. updates: in the whole run.
    """
    model, engine = runner.model, runner.engine
    rates = list(rate_rows(runner, cfg, updates))
    with waiting("the first update, its data included"):
        began = time.perf_counter()
        model.train()
        outputs = model.train_step(next(iter(loader)), None)
        seconds = time.perf_counter() - began
    comm.barrier()
    if engine.global_rank != 0:
        return
    console = Console(markup=False)
    console.print(table("modules", ("module", "parameters", "share", "frozen", "lr", "weight decay"), modules))
    console.print(
        table(
            "batch and schedule",
            ("what", "value"),
            [("batch", str(plan.batch).removeprefix("batch ")), ("updates", str(updates))],
        )
    )
    console.print(table("learning rate of the first group", ("update", "rate"), rates))
    if engine.agvm is not None:
        console.print(table("AGVM", ("what", "value"), agvm_rows(engine.agvm.config, updates)))
    console.print(memory_table(cfg, plan, engine))
    made = [("loss", f"{outputs['log_vars']['loss']:.4g}"), ("seconds", f"{seconds:.2f}")]
    if (norm := engine.get_global_grad_norm()) is not None:  # stage 0 in fp32 has none
        made.insert(1, ("gradient norm", f"{float(norm):.4g}"))
    if torch.cuda.is_available():
        made.append(("peak memory, this rank", f"{torch.cuda.max_memory_allocated() / GIB:.2f} GiB"))
    console.print(table("the first update", ("what", "value"), made))
    console.print(f"{REHEARSED} or changed; the same command without --dry-run trains")


def table(title: str, head: tuple[str, ...], rows: list[Any]) -> Table:
    """For the terminal; the first column is words, the others numbers."""
    result = Table(title=title, title_justify="left")
    for place, name in enumerate(head):
        result.add_column(name, justify="left" if place == 0 or len(head) == 2 else "right", overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result


def module_rows(detector: nn.Module, groups: list[Group]) -> Iterator[tuple[str, ...]]:
    """Module, trainable parameters, share, frozen ones, learning rates, weight decays; of groups not cut by ZeRO yet."""
    total = sum(p.numel() for group in groups for p in group[PARAMS])
    for name in dict.fromkeys(group["module"] for group in groups):
        mine = [group for group in groups if group["module"] == name]
        count = sum(p.numel() for group in mine for p in group[PARAMS])
        named = detector.named_parameters()
        frozen = sum(p.numel() for key, p in named if key.startswith(f"{name}.") and not p.requires_grad)
        yield (
            name,
            f"{count:,}",
            f"{count / total:.1%}",
            f"{frozen:,}",
            *(_range([group[key] for group in mine if key in group]) for key in ("lr", "weight_decay")),
        )


def _range(values: list[Any]) -> str:
    numbers = sorted({float(value) for value in values})
    if not numbers:
        return "-"
    return f"{numbers[0]:.4g}" if len(numbers) == 1 else f"{numbers[0]:.4g} to {numbers[-1]:.4g}"


def rate_rows(runner: Any, cfg: Config, updates: int) -> Iterator[tuple[str, str]]:
    """The rate that mmcv's schedule gives at some updates."""
    hook = next((hook for hook in runner._hooks if isinstance(hook, LrUpdaterHook)), None)
    first = dict(runner.optimizer.param_groups[0])
    if hook is None:
        yield "0", f"{float(first['initial_lr']):.4g}, the DeepSpeed JSON's scheduler acts"
        return
    per_epoch = runner.updates_per_epoch or updates
    warm_up = warm_up_updates(cfg, per_epoch)
    # What hooks look at; some keep what they find when a run begins.
    seen = SimpleNamespace(
        optimizer=SimpleNamespace(param_groups=[first]),
        data_loader=range(per_epoch),
        max_iters=updates,
        max_epochs=max(updates // per_epoch, 1),
    )
    hook.before_run(seen)
    spread = [round(k * (updates - 1) / (MILESTONES - 1)) for k in range(MILESTONES)]
    steps = (cfg.lr_config or {}).get("step") or []
    steps = [steps] if isinstance(steps, int) else steps
    falls = [step * (per_epoch if hook.by_epoch else 1) for step in steps]
    for update in sorted({t for t in (*spread, warm_up, *falls) if 0 <= t < updates}):
        seen.iter, seen.epoch = update, update // per_epoch
        yield f"{update:,}", f"{_rate(hook, seen, warm_up):.4g}"


def _rate(hook: Any, seen: Any, warm_up: int) -> float:
    """mmcv's in update ``seen.iter``."""
    update = seen.iter
    if hook.warmup is not None:
        hook.warmup_iters = warm_up
    regular = float(hook.get_lr(seen, hook.base_lr[0]))
    if hook.warmup is None or update >= warm_up:
        return regular
    hook.regular_lr = [regular]
    return float(hook.get_warmup_lr(update)[0])


def warm_up_updates(cfg: Config, per_epoch: int) -> int:
    """Updates in which the config's schedule warms the rate up."""
    lr = cfg.get("lr_config") or {}
    if not lr.get("warmup"):
        return 0
    return int(lr.get("warmup_iters", 0)) * (per_epoch if lr.get("warmup_by_epoch") else 1)


def agvm_rows(config: Any, updates: int) -> list[tuple[str, str]]:
    """Its windows over the run."""
    last = min(updates - 1, updates - 1 if config.stop_step is None else config.stop_step)
    measured = config.measures(updates)
    span = (
        f"{len(measured):,}: updates {measured[0]:,} to {measured[-1]:,}, every {config.interval}"
        if measured
        else "none"
    )
    rows = [
        ("estimator", f"{config.estimator}, precondition {config.precondition}"),
        ("anchor", config.anchor),
        ("modulated", f"updates {config.start_step:,} to {last:,}" if config.modulate else "no: measures only"),
        ("measures", span),
    ]
    if config.ema_decay < 1:
        rows.append(("the average remembers", f"{config.memory:.0f} measures"))
    if config.clip_window is not None:
        rows.append(("clipping", f"updates {config.clip_window[0]:,} to {config.clip_window[1]:,}"))
    return rows


def memory_table(cfg: Config, plan: Plan, engine: Any) -> Table:
    """What a rank would hold in each ZeRO stage, without activations, in fp32: see agvm_ds.mmdet.planning.memory."""
    sizes = footprint(cfg)
    optimizer = engine.basic_optimizer
    base = getattr(optimizer, "base", type(optimizer))
    moments = moments_of(base, optimizer.defaults)
    agvm = engine.agvm
    elementwise = agvm is not None and (agvm.config.estimator == "split" or agvm.preconditioned)
    stage = int(engine.zero_optimization_stage())
    rows = []
    for one in range(4):
        need = needs(sizes, one, 1, plan.batch.ranks, moments, elementwise)
        parts = [need.states, need.bucket, need.agvm, need.total]
        rows.append((f"{one}{' (this run)' if one == stage else ''}", *(f"{part / GIB:.2f}" for part in parts)))
    saved = "" if sizes.saved is None else f"; a micro-batch's activations {sizes.saved * plan.batch.micro / GIB:.2f}"
    return table(
        f"estimated memory of a rank, GiB, fp32{saved}",
        ("ZeRO stage", "weights, gradients, states", "reduce bucket", "AGVM", "all"),
        rows,
    )
