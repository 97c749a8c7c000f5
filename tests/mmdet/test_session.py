"""What a run has before anything is built: ranks, seeds."""

from __future__ import annotations

import importlib.util
import os
import random
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
from deepspeed import comm
from mmcv import Config
from torch.distributed import DistBackendError

from agvm_ds.config import ConfigError
from agvm_ds.demo import data
from agvm_ds.mmdet import session
from agvm_ds.mmdet.process.errors import HostError
from agvm_ds.mmdet.session import agreeing, init_distributed, make_demo_data, settle_seed
from tests.launch import run_ranks


def test_without_a_launcher_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed would look for MPI, and end in an ImportError where mpi4py is not installed."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not started by a launcher"):
        init_distributed()


def test_ranks_that_do_not_meet_end_with_the_address_and_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that another process has, for one reason."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        for name, value in {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(deepspeed.comm.comm, "cdb", None)
        with pytest.raises(HostError, match=rf"did not all meet at 127.0.0.1:{port}: (?s:.*)DEEPSPEED_TIMEOUT"):
            init_distributed()


def test_a_rank_without_its_gpu_and_a_backend_that_does_not_start_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here: the accelerator is a stand-in."""
    gpu = SimpleNamespace(device_name=lambda: "cuda", device_count=lambda: 1, communication_backend_name=lambda: "nccl")
    monkeypatch.setattr(session, "get_accelerator", lambda: gpu)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(HostError, match="LOCAL_RANK = 3, and this process sees 1 GPUs: .* --gpus-per-node"):
        init_distributed()

    def fails(backend: str) -> None:
        raise DistBackendError("NCCL error in: x.cpp:1, unhandled system error\nLast error:\nno interface")

    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(deepspeed, "init_distributed", fails)
    with pytest.raises(
        HostError, match=r"nccl does not start: NCCL error in(?s:.*)no interface\n  with NCCL_DEBUG=INFO"
    ):
        init_distributed()


def mistakes(of_all: bool) -> tuple[type, str]:
    """In a rank: rank 1 finds a mistake, or every rank does."""
    try:
        with agreeing():
            if of_all or comm.get_rank() == 1:
                raise ConfigError("it is wrong")
    except ConfigError as error:
        return type(error), str(error)
    raise AssertionError("it went on")


def test_what_one_rank_finds_wrong_ends_all(tmp_path: Path) -> None:
    assert run_ranks(mistakes, 2, tmp_path, True) == [(ConfigError, "it is wrong")] * 2
    assert run_ranks(mistakes, 2, tmp_path, False) == [(HostError, f"on {socket.gethostname()}: it is wrong")] * 2


def made(place: Path) -> None:
    """In a rank, the first of its host: who made the data set, into a file."""
    os.environ["LOCAL_RANK"] = "0"

    def ensure(root: Any) -> None:
        if not Path(root).exists():
            with (place / "makers").open("a") as file:
                file.write(f"{comm.get_rank()}\n")
            Path(root).mkdir()

    data.ensure = ensure  # type: ignore[assignment]
    make_demo_data(None, Config(dict(data_root=str(place / "shared"))))
    make_demo_data(None, Config(dict(data_root=str(place / f"disk_{comm.get_rank()}"))))


def test_the_demos_data_are_made_once_a_folder(tmp_path: Path) -> None:
    run_ranks(made, 2, tmp_path, tmp_path)
    assert (tmp_path / "makers").read_text().split() == ["0", "0", "1"]


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
