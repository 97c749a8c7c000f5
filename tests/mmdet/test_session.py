"""What a run has before anything is built: ranks, seeds."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from mmcv import Config

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.session import init_distributed, settle_seed
from tests.launch import run_ranks


def test_without_a_launcher_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed would look for MPI, and end in an ImportError where mpi4py is not installed."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not started by a launcher"):
        init_distributed()


def draws(asked: int | None, configured: int | None, diff_seed: bool) -> tuple[int, list[float]]:
    """The samplers' seed, and the first number of each generator."""
    cfg = Config(dict(seed=configured))
    seed = settle_seed(cfg, asked, diff_seed, deterministic=False)
    assert cfg.seed == seed
    return seed, [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_ranks_share_a_seed_and_differ_by_their_number_when_asked(tmp_path: Path) -> None:
    """The samplers' seed is shared always; the command line's goes before the config's."""
    same = run_ranks(draws, 2, tmp_path, 5, 9, False)
    assert same[0] == same[1] and same[0][0] == 5
    differ = run_ranks(draws, 2, tmp_path, None, 5, True)
    assert differ[0] == same[0] and differ[1][0] == 5
    assert not set(differ[0][1]) & set(differ[1][1])
    unseeded = run_ranks(draws, 2, tmp_path, None, None, False)
    assert unseeded[0] == unseeded[1]
