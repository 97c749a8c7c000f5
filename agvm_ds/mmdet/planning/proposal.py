"""From nodes, GPUs and a target batch to a run: DeepSpeed JSON, changes of the mmdet config, and the rule of each figure.

The config's model and data are left alone.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mmcv import Config

from agvm_ds.bases import base_from_json, preconditioned
from agvm_ds.config import ConfigError
from agvm_ds.mmdet.configs import read_config
from agvm_ds.mmdet.data import check_size
from agvm_ds.mmdet.limits import refuse_unsupported
from agvm_ds.mmdet.plan import make_plan
from agvm_ds.mmdet.planning import scaling
from agvm_ds.mmdet.planning.averages import scaled_averages
from agvm_ds.mmdet.planning.layout import Base, Layout, batch_rows, choose_layout, memory_rows
from agvm_ds.mmdet.planning.memory import footprint, moments_of
from agvm_ds.mmdet.planning.request import Request, Row
from agvm_ds.mmdet.planning.schedule import base_batch, learning_rate, schedule, training_images

NOT_OPTIONS = ("type", "paramwise_cfg", "constructor")
"""Keys of an mmdet config's optimizer that are no arguments of it; the latter two act from the config in any case."""


@dataclass(frozen=True)
class Proposal:
    """``deepspeed``: the JSON; ``changes``: KEY -> value for ``launch/train.py --cfg-options``; ``rows``: the rules."""

    request: Request
    deepspeed: dict[str, Any]
    changes: dict[str, Any]
    rows: list[Row]

    @property
    def text(self) -> str:
        """The JSON, as a file has it."""
        return json.dumps(self.deepspeed, indent=2) + "\n"

    def command(self, json_file: str) -> str:
        """The launch, for a shell; the request's own ``--cfg-options`` are in it."""
        request = self.request
        hosts = f"--num_gpus {request.gpus}" if request.nodes == 1 else "--hostfile hosts"
        pairs = [f"{key}={_value(value)}" for key, value in {**request.cfg_options, **self.changes}.items()]
        words = [request.config, "--deepspeed_config", json_file, "--work-dir", "W", "--cfg-options", *pairs]
        return f"deepspeed {hosts} launch/train.py {shlex.join(words)}"


def propose(request: Request) -> Proposal:
    """Settle every figure of a run. Raises ConfigError for what cannot be, saying what can."""
    cfg = read_config(request.config, request.cfg_options)
    if not cfg.get("optimizer"):
        raise ConfigError("optimizer: the config names none to scale")
    images, counted = training_images(cfg, request.images)
    block = {"type": cfg.optimizer.type, "params": _options(cfg)}
    base, options = base_from_json({"optimizer": block})
    rate = learning_rate(request, cfg, images)
    sizes, samples = footprint(cfg), int(cfg.data.train_dataloader.get("samples_per_gpu", 2))
    layout = choose_layout(request, sizes, samples, Base(moments_of(base, options), preconditioned(base)))
    check_size(images, layout.batch)
    windows = scaling.windows(images, request.batch)
    meant_for, _ = base_batch(cfg, request.base_batch)
    run = schedule(cfg, rate, images, meant_for, layout.batch, windows.warmup)
    scaling.refuse_late_start(windows.start_step, run.updates)
    block["params"]["lr"] = rate.value
    norm = (cfg.get("optimizer_config") or {}).get("grad_clip") or {}
    deepspeed = _json(layout, block, windows, norm.get("max_norm"))
    averages = scaled_averages(cfg, meant_for, layout.batch)
    changes = {**run.changes, **averages.changes}
    _accept(request, deepspeed, changes)
    rows = [
        Row("training images", f"{images:,}", counted),
        *batch_rows(request, layout, samples),
        *memory_rows(request, sizes, layout),
        *rate.rows,
        *run.rows,
        *_window_rows(windows, norm.get("max_norm")),
        *averages.rows,
    ]
    return Proposal(request, deepspeed, changes, rows)


def _options(cfg: Config) -> dict[str, Any]:
    return {key: value for key, value in cfg.optimizer.to_dict().items() if key not in NOT_OPTIONS}


def _json(
    layout: Layout, optimizer: Mapping[str, Any], windows: scaling.Windows, max_norm: float | None
) -> dict[str, Any]:
    """max_norm: the config's; it clips in every update."""
    clip_window = {"clip_window": list(windows.clip)} if max_norm is None else {}
    return {
        "train_batch_size": layout.batch.train,
        "train_micro_batch_size_per_gpu": layout.batch.micro,
        "optimizer": dict(optimizer),
        "gradient_clipping": scaling.CLIP_NORM if max_norm is None else max_norm,
        "zero_optimization": {"stage": layout.stage},
        "agvm": {
            "anchor": "backbone",
            "interval": windows.interval,
            "start_step": windows.start_step,
            "ema_decay": scaling.EMA_DECAY,
            **clip_window,
        },
    }


def _accept(request: Request, deepspeed: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Raise ConfigError for what ``launch/train.py`` would refuse before its ranks meet."""
    cfg = read_config(request.config, {**request.cfg_options, **changes})
    refuse_unsupported(cfg, make_plan(deepspeed, cfg, request.ranks))


def _window_rows(windows: scaling.Windows, max_norm: float | None) -> Iterator[Row]:
    margin = scaling.MARGIN
    first, last = windows.clip
    yield Row("AGVM from", f"update {windows.start_step}", f"{margin} updates after the warm-up: official AGVM recipes")
    if max_norm is not None:
        yield Row(f"clipping to norm {max_norm:g}", "every update", "the config's optimizer_config.grad_clip")
    else:
        yield Row(
            f"clipping to norm {scaling.CLIP_NORM:g}",
            f"updates {first} to {last}",
            f"from {margin} updates before the warm-up ends until AGVM starts: official AGVM recipes",
        )
    rule = f"10; 5 from batch {scaling.OFTEN_FROM}: AGVM, arXiv 2210.11078"
    yield Row("AGVM's interval", f"{windows.interval} updates", rule)
    yield Row("AGVM's EMA decay", str(scaling.EMA_DECAY), "official AGVM recipes")


def _value(value: Any) -> str:
    """As mmcv's DictAction reads it."""
    return f"[{','.join(map(_value, value))}]" if isinstance(value, (list, tuple)) else str(value)
