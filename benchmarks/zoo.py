"""The AGVM modules of every detector that mmdet ships, and a training of detectors that differ in kind.

    python -m benchmarks.zoo                  about 2 minutes to build all, 8 more to train
    python -m benchmarks.zoo --no-training    the modules alone
    python -m benchmarks.zoo --write          puts the table into docs/detectors.md as well

Every config of the installed mmdet is read and its detector built, without weights. Printed is a line for each way in
which a family's detectors are cut: how many configs, the modules with their share of the trainable parameters, the share
outside of all modules (which must be 0), and how its training went (zoo_training.py). What mmdet itself cannot
build here is listed with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import mmdet
import torch
from mmcv import Config
from mmdet.models import build_detector
from rich.console import Console
from rich.progress import track
from torch import nn

from agvm_ds.config import ConfigError
from agvm_ds.groups import MODULE, PARAMS, REST, cut_groups
from agvm_ds.mmdet.configs import read_config, shipped_configs
from agvm_ds.mmdet.modules import modules_of
from benchmarks.machine import save
from tests.launch import CONTEXT

DOCUMENT = Path(__file__).parents[1] / "docs" / "detectors.md"
PIECES = "has no model"
"""What read_config says of the files that others inherit from."""


@dataclass(frozen=True)
class Cut:
    """A config's modules in order of definition, each with its share of the trainable parameters; or why there are none."""

    config: str
    shares: dict[str, float]
    reason: str = ""

    @property
    def family(self) -> str:
        """mmdet's folder."""
        return self.config.partition("/")[0]

    @property
    def outside(self) -> float:
        """Share of the trainable parameters that no module has."""
        return self.shares.get(REST, 0.0)


def detector_of(cfg: Config) -> nn.Module:
    """A config's detector without memory for its weights, where its code allows that."""
    settings = {"train_cfg": cfg.get("train_cfg"), "test_cfg": cfg.get("test_cfg")}
    if "teacher_ckpt" in cfg.model:
        cfg.model.teacher_ckpt = None
    with _quiet():
        try:
            with torch.device("meta"):
                return build_detector(cfg.model, **settings)
        except (NotImplementedError, RuntimeError):  # it computes with numbers that it keeps in tensors
            return build_detector(cfg.model, **settings)


def shares_of(detector: nn.Module, names: Sequence[str]) -> dict[str, float]:
    """Module -> its share of the trainable parameters. Raises AssertionError where a parameter is in two, or in none."""
    trainable = [p for p in detector.parameters() if p.requires_grad]
    groups = cut_groups([{PARAMS: trainable}], detector, names)
    placed = [id(p) for group in groups for p in group[PARAMS]]
    assert sorted(placed) == sorted(id(p) for p in trainable), "a parameter is in no module, or in two"
    total = sum(p.numel() for p in trainable)
    return {group[MODULE]: sum(p.numel() for p in group[PARAMS]) / total for group in groups}


def cuts(names: Sequence[str]) -> list[Cut]:
    """The cut of each config that has a model: many of mmdet's files are pieces of others. A process a core."""
    families = [list(group) for _, group in groupby(names, key=lambda name: name.partition("/")[0])]
    with CONTEXT.Pool() as pool:
        found = track(pool.imap(cuts_here, families), "building", len(families), console=Console(stderr=True))
        return [cut for family in found for cut in family]


def cuts_here(names: Sequence[str]) -> list[Cut]:
    """The same in this process; the same model is built once."""
    found: list[Cut] = []
    known: dict[str, Cut] = {}
    with _as_in_mmdet():
        for name in names:
            try:
                with _quiet():
                    cfg = read_config(name)
            except ConfigError as error:
                if PIECES not in str(error):
                    found.append(Cut(name, {}, _short(str(error).removeprefix(f"config {shipped_configs()[name]}:"))))
                continue
            model = repr(cfg.model)
            if model not in known:
                known[model] = cut_of(name, cfg)
            found.append(replace(known[model], config=name))
    return found


def cut_of(name: str, cfg: Config) -> Cut:
    """One config's."""
    try:
        detector = detector_of(cfg)
    except (AssertionError, AttributeError, ImportError, LookupError, OSError, TypeError, ValueError) as error:
        return Cut(name, {}, _short(f"{type(error).__name__}: {error}"))
    return Cut(name, shares_of(detector, modules_of(detector)))


def _short(text: str) -> str:
    return " ".join(text.split())[:160]


@contextmanager
def _as_in_mmdet() -> Iterator[None]:
    """In mmdet's folder, which some configs name others from, and in a group of one rank, which SyncBN asks for."""
    before = Path.cwd()
    os.chdir(Path(mmdet.__file__).parent / ".mim")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        os.chdir(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without mmdet's remarks on its own configs."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
