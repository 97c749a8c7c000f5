"""A checkpoint as one published ``.pth``: fp32 weights and plain meta, for plain mmdet, with its digest in its name."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mmcv
import mmdet
import torch
from mmcv import Config
from mmdet.utils import get_root_logger
from torch import nn

import agvm_ds
from agvm_ds.config import ConfigError
from agvm_ds.mmdet.checkpointing import plain
from agvm_ds.mmdet.configs import blamed, read_config
from agvm_ds.mmdet.data_sets import data_sets, kind_of
from agvm_ds.mmdet.detector.weights import in_float32, load_weights, put_weights
from agvm_ds.mmdet.evaluate import plain_detector
from agvm_ds.mmdet.process.errors import HostError
from agvm_ds.mmdet.process.outputs import refuse_unwritable, told, written_whole
from agvm_ds.mmdet.testing.saved import read_published

KEPT = ("epoch", "iter", "seed", "CLASSES", "PALETTE")
"""What is taken from a checkpoint's own meta, where it has it."""


@dataclass(frozen=True)
class ExportOptions:
    """The command line of ``launch/export.py``."""

    config: str
    checkpoint: str
    out: Path
    trust_checkpoint: bool = False
    cfg_options: dict[str, Any] = field(default_factory=dict)


def export(options: ExportOptions) -> Path:
    """Write the file, in one process; its name is ``out``'s with the first 8 digits of its SHA-256 added, and returned.

    The same checkpoint and config give the same bytes, and so the same name. Raises ConfigError for bad input.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("launch/export.py is one process: start it with python, without DeepSpeed's launcher")
    if options.out.suffix != ".pth":
        raise ConfigError(f"{options.out}: the file to write must be named .pth")
    refuse_unwritable("the file to write:", options.out)
    if "://" not in options.checkpoint and not Path(options.checkpoint).exists():
        raise HostError(f"checkpoint not found: {options.checkpoint}")
    cfg = read_config(options.config, options.cfg_options)
    detector = plain_detector(cfg, "cpu")
    meta = {**names_of(cfg), **load(detector, options), **versions(), "config": cfg.pretty_text}
    weights = {name: in_float32(value) for name, value in detector.state_dict().items()}
    return write(options.out, {"meta": plain(meta), "state_dict": weights})


def load(detector: nn.Module, options: ExportOptions) -> dict[str, Any]:
    """All weights of the detector, and what to keep of the checkpoint's meta."""
    meta: Mapping[str, Any]
    place = Path(options.checkpoint)
    if place.is_dir():
        published = read_published(place)
        put_weights(detector, published.weights, place)
        meta = published.meta
    else:
        logger, trust = get_root_logger(), options.trust_checkpoint
        meta = load_weights(detector, options.checkpoint, logger, trust, whole=True)
    return {key: meta[key] for key in KEPT if meta.get(key) is not None}


def names_of(cfg: Config) -> dict[str, Any]:
    """CLASSES of the (first) data set to test, and PALETTE if its kind has one that is long enough."""
    where, node = next(data_sets(cfg.data.get("test"), "data.test"), ("", None))
    if node is None:
        return {}
    with blamed(where):
        kind = kind_of(node)
        classes = kind.get_classes(node.get("classes"))
    palette = getattr(kind, "PALETTE", None) or ()
    return {"CLASSES": classes, **({"PALETTE": palette[: len(classes)]} if len(palette) >= len(classes) else {})}


def versions() -> dict[str, str]:
    """Of what the weights are read with."""
    return {
        "agvm_ds_version": agvm_ds.__version__,
        "mmdet_version": mmdet.__version__,
        "mmcv_version": mmcv.__version__,
        "torch_version": torch.__version__,
    }


def write(out: Path, content: Mapping[str, Any]) -> Path:
    """Write ``out`` with the digest in its name, whole or not at all. Raises HostError."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()[:8]
    path = out.with_name(f"{out.stem}-{digest}.pth")
    with told(path), written_whole(path) as file:
        file.write(buffer.getbuffer())
    return path
