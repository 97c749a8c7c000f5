"""The toy model's engines in every layout: ranks, ZeRO stage, precision, and what else changes the flat buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.ops.adam import FusedAdam
from torch import nn

from agvm_ds import AGVM, param_groups
from agvm_ds.checkpoints import Placed
from tests.engines import OPTIONS, ds_config, started
from tests.toy import Toy

N = 6
"""Micro-batches of an update, in every run."""
MODULES = ["backbone", "neck", "rpn_head", "roi_head"]


EXTRAS: dict[str, dict[str, Any]] = {
    "round robin": {"zero_optimization": {"round_robin_gradients": True}},
    "aligned": {"zero_optimization": {"parameter_alignment": True}},
    "sub-groups": {"zero_optimization": {"sub_group_size": 50}},
    "offload": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False},
    "fp32 accumulation": {"data_types": {"grad_accum_dtype": "fp32"}},
}
"""What changes the flat buffers, or where they are."""


@dataclass(frozen=True)
class Run:
    """One layout."""

    ranks: int
    stage: int
    base: str = "SGD"
    bf16: bool = False
    modules: tuple[str, ...] | None = None
    agvm: bool = True
    extra: str = ""
    """One of EXTRAS."""

    def __str__(self) -> str:
        words = [f"{self.ranks} ranks", f"stage {self.stage}", self.base, "bf16" * self.bf16]
        words.append(self.extra)
        return " ".join(filter(None, [*words, "modules" * bool(self.modules), "" if self.agvm else "off"]))

    @contextmanager
    def start(self, seed: int = 0, model: nn.Module | None = None) -> Iterator[tuple[Any, Placed]]:
        """Its engine, and its parameters; of the toy model unless another is given."""
        model = Toy(seed=seed) if model is None else model
        groups = param_groups(model, list(self.modules) if self.modules else None)
        placed = Placed.of(model, groups)
        more = {"bf16": {"enabled": True}} if self.bf16 else {}
        base = "AdamW" if self.base == "FusedAdam" else self.base
        config = ds_config(self.stage, N // self.ranks, base, **more)
        for key, value in EXTRAS.get(self.extra, {}).items():
            config[key] = {**config[key], **value} if key in config and isinstance(value, dict) else value
        if not self.agvm:
            config["agvm"]["enabled"] = False
        kind = FusedAdam if self.base == "FusedAdam" else getattr(torch.optim, self.base)
        optimizer = AGVM(groups, base=kind, **OPTIONS[base])
        with started(config, model, optimizer=optimizer) as engine:
            yield engine, placed
