"""What a run has before anything is built: its ranks, folder, log and seed, and the built-in data."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import deepspeed
import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout
from mmcv import Config
from mmdet.apis import init_random_seed, set_random_seed
from mmdet.utils import collect_env, get_root_logger, setup_multi_processes
from torch.distributed import DistBackendError

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.compat import mend_mmdet
from agvm_ds.mmdet.configs import is_demo
from agvm_ds.mmdet.evaluate import broadcast_object
from agvm_ds.mmdet.process.errors import HostError

LOCK = ".lock"
"""A work dir's file that the launch at work there has locked."""


def init_distributed() -> None:
    """Join the ranks over the accelerator's backend (gloo without a GPU).

    Raises ConfigError when nobody started ranks, HostError when they do not meet.
    """
    if "RANK" not in os.environ and importlib.util.find_spec("mpi4py") is None:
        raise ConfigError(
            "not started by a launcher (RANK is not set): start with `deepspeed launch/...`, on one rank too"
        )
    _refuse_missing_gpu()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    mend_mmdet()
    backend = get_accelerator().communication_backend_name()
    try:
        deepspeed.init_distributed(backend)
    except DistBackendError as error:
        raise HostError(f"{backend} does not start: {error}\n  with NCCL_DEBUG=INFO it says more") from error
    except RuntimeError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise HostError(
            f"the ranks did not all meet at {where}: {str(error).strip().splitlines()[0]}\n  Every host must reach that "
            f"address within {default_pg_timeout} (DEEPSPEED_TIMEOUT, minutes), over the interface that GLOO_SOCKET_IFNAME "
            "or NCCL_SOCKET_IFNAME names"
        ) from error
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # which DeepSpeed finds out under MPI


def _refuse_missing_gpu() -> None:
    """Raise HostError for a rank whose GPU its process does not see; under MPI DeepSpeed finds out LOCAL_RANK later."""
    device, place = get_accelerator(), int(os.environ.get("LOCAL_RANK", "0"))
    if device.device_name() != "cpu" and place >= (seen := device.device_count()):
        raise HostError(
            f"LOCAL_RANK = {place}, and this process sees {seen} GPUs: start one rank a GPU (deepspeed --num_gpus); under "
            "Slurm with --gpus-per-node or --gres, for with --gpus-per-task each sees its own alone"
        )


@contextmanager
def agreeing() -> Iterator[None]:
    """What one rank finds wrong ends all of them, and none waits for those that have ended. Every rank must come by.

    Raises the ConfigError that every rank has; one that only some have, as a HostError that names the first one's host.
    """
    mine: ConfigError | None = None
    try:
        yield
    except ConfigError as error:
        mine = error
    found: list[Any] = [None] * comm.get_world_size()
    torch.distributed.all_gather_object(found, mine and (socket.gethostname(), str(mine)))
    if mine is not None and all(found):
        raise mine
    for host, text in filter(None, found):
        raise HostError(f"on {host}: {text}") from mine


@contextmanager
def alone_in(work_dir: Path) -> Iterator[None]:
    """Raise ConfigError when another launch is at work in this folder. The system takes the lock away from a dead process."""
    with (work_dir / LOCK).open("a+") as file:
        if refusal := broadcast_object(_lock(file) if comm.get_rank() == 0 else None):
            raise ConfigError(f"--work-dir {work_dir}: {refusal}")
        yield


def _lock(file: TextIO) -> str | None:
    """Why the lock cannot be had, None when it is had. It is this process's alone: data workers do not inherit it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return (
            f"another launch is at work there ({file.read().strip()}); wait for it, stop it, or use another folder. A "
            f"host that went down may keep the lock on NFS: if that one did, remove {LOCK} there"
        )
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return f"cannot be locked: {error.strerror}"
        logging.getLogger("agvm_ds").warning("this file system has no locks: nothing keeps a second launch out")
    file.truncate(0)
    file.write(f"rank 0 is process {os.getpid()} on {socket.gethostname()}, since {time.asctime()}\n")
    file.flush()
    return None


def make_demo_data(name: str | None, cfg: Config) -> None:
    """The built-in data set, if the config of this name is one of its own.

    It is made by rank 0, and then by the first rank of each host that does not find it there.
    """
    from agvm_ds.demo.data import ensure

    if not is_demo(name):
        return
    for makes in (comm.get_rank() == 0, os.environ.get("LOCAL_RANK", "0") == "0"):
        with agreeing():
            if makes:
                try:
                    ensure(cfg.data_root)
                except (OSError, ImportError) as error:
                    raise HostError(f"the built-in data: {error}") from error


def open_log(cfg: Config, work_dir: Path | None, environment: bool = True) -> logging.Logger:
    """mmdet's logger: rank 0 writes text to the terminal and ``<time>.log``; AGVM's words go to the same places.

    work_dir: None writes no file. environment: begin with the versions of what is installed.
    """
    cfg.timestamp = time.strftime("%Y%m%d_%H%M%S", time.localtime())
    file = None if work_dir is None else str(work_dir / f"{cfg.timestamp}.log")
    logger = get_root_logger(file, cfg.get("log_level", "INFO"))
    own = logging.getLogger("agvm_ds")
    own.handlers, own.propagate = logger.handlers, False
    own.setLevel(logger.level)
    setup_multi_processes(cfg)
    torch.backends.cudnn.benchmark = bool(cfg.get("cudnn_benchmark", False))
    if environment and comm.get_rank() == 0:
        logger.info("Environment:\n%s", "\n".join(f"{key}: {value}" for key, value in collect_env().items()))
    return logger  # type: ignore[no-any-return]


def settle_seed(cfg: Config, asked: int | None, diff_seed: bool, deterministic: bool) -> int:
    """Seed this rank as mmdet's tools do: one seed for all ranks unless ``diff_seed``, which adds the rank."""
    device = get_accelerator().device_name()
    seed = int(init_random_seed(asked if asked is not None else cfg.get("seed"), device))
    set_random_seed(seed + comm.get_rank() if diff_seed else seed, deterministic=deterministic)
    cfg.seed = seed  # the samplers' seed must be the same on all ranks
    get_root_logger().info("seed %d%s", seed, ", plus the rank" if diff_seed else "")
    return seed
