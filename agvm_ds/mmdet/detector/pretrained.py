"""The pretrained weights that a detector starts from: on every host before they are read, and fetched once.

mmcv reads a URL's file from torch.hub's cache, and fetches it by itself when it is not there: with a traceback a rank when it
cannot, and, on every host but the first, in all ranks at once.
"""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

import torch
from deepspeed import comm
from mmcv.runner.checkpoint import (
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)
from mmdet.utils import get_root_logger
from torch import nn

from agvm_ds.checkpoints import any_pickle, weights_only
from agvm_ds.config import ConfigError
from agvm_ds.mmdet import session
from agvm_ds.mmdet.process.errors import HostError

SILENCE = 60.0
"""Seconds without a byte after which a server is given up."""


def _open_mmlab() -> dict[str, str]:
    models, renamed = get_external_models(), get_deprecated_model_names()
    return {**models, **{old: models[new] for old, new in renamed.items() if new in models}}


ZOOS: dict[str, Callable[[], Mapping[str, str]]] = {
    **dict.fromkeys(("torchvision", "modelzoo"), get_torchvision_models),
    **dict.fromkeys(("open-mmlab", "openmmlab"), _open_mmlab),
    "mmcls": get_mmcls_models,
}
"""Scheme -> the URLs by name, as mmcv looks them up."""


def sources_of(detector: nn.Module) -> dict[str, str]:
    """The checkpoints that ``detector.init_weights()`` reads -> the config's key that names each."""
    found: dict[str, str] = {}
    for name, module in detector.named_modules():
        init = getattr(module, "init_cfg", None) or []
        for one in init if isinstance(init, (list, tuple)) else [init]:
            if one.get("type") == "Pretrained":
                found.setdefault(str(one["checkpoint"]), f"model.{name}.init_cfg.checkpoint")
    return found


def url_of(source: str) -> str | None:
    """The URL of a checkpoint; None for a file, and for what mmcv reads by other means (ceph, pavi).

    Raises LookupError for a name that the zoo of its scheme does not have.
    """
    scheme, _, name = source.partition("://")
    if scheme in ("http", "https"):
        return source
    if not name or scheme not in ZOOS:
        return None
    url = ZOOS[scheme]().get(name)
    if url is None:
        raise LookupError(f"mmcv knows no weights {source}")
    return url


def cached(url: str) -> Path:
    """Where torch.hub has a URL's file: ``TORCH_HOME`` (by default ``~/.cache/torch``) / hub / checkpoints / its name."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name


def provide(sources: Mapping[str, str]) -> None:
    """Have every checkpoint on this host: by rank 0, then by the first rank of each host that does not find it there.

    sources: as ``sources_of`` gives them. Every rank must call it. Raises ConfigError, on every rank, with all that is
    missing anywhere.
    """
    for provides in (comm.get_rank() == 0, os.environ.get("LOCAL_RANK", "0") == "0"):
        with session.agreeing():
            problems = [*filter(None, (_problem(*item) for item in sources.items()))] if provides else []
            if problems:
                raise HostError("\n  ".join(problems))


def _problem(source: str, key: str) -> str | None:
    """Why a checkpoint is not here and cannot be fetched; None when it is."""
    try:
        url = url_of(source)
    except LookupError as error:
        return f"{key}: {error.args[0]}"
    if url is None:
        missing = "://" not in source and not Path(source).is_file()
        return f"{key}: not found: {source}" if missing else None
    place = cached(url)
    if place.exists():
        return None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        get_root_logger().info("fetching %s to %s", url, place)
        with _given_up_after(SILENCE):
            torch.hub.download_url_to_file(url, str(place), progress=False)
    except OSError as error:
        return (
            f"{key} = {source}: {url} cannot be fetched: {error}; fetch it where there is a network and put it at {place} "
            f"on every host (TORCH_HOME moves that folder), or name a file: --cfg-options {key}=FILE"
        )
    return None


@contextmanager
def _given_up_after(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def init_weights(detector: nn.Module, trust: bool = False) -> None:
    """``detector.init_weights()``, with every checkpoint provided. Raises ConfigError for one that cannot be read.

    Every rank must call it. trust: read whatever a file holds, which can run code; else tensors and plain data alone.
    """
    sources = sources_of(detector)
    provide(sources)
    with session.agreeing():
        try:
            with any_pickle() if trust else weights_only():
                detector.init_weights()  # type: ignore[operator]
        except (AssertionError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(_unreadable(sources, error)) from error
        except pickle.UnpicklingError as error:
            hint = "" if trust else "; --trust-checkpoint reads it whatever it holds, which can run code"
            raise ConfigError(_unreadable(sources, error) + hint) from error


def _unreadable(sources: Mapping[str, str], error: Exception) -> str:
    named = ", ".join(f"{key} = {source}" for source, key in sources.items()) or "init_cfg"
    return f"{named}: weights cannot be initialised: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
