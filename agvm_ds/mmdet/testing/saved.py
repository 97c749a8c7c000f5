"""The weights of a DeepSpeed checkpoint as they were published at that moment, read without an engine or other ranks."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agvm_ds.checkpoints import CheckpointError, Manifest, Vault, WholeState
from agvm_ds.checkpoints.vault import MANIFEST
from agvm_ds.mmdet.checkpointing import AVERAGES_PUBLISHED, RUNNER_KEY, UNROUNDED
from agvm_ds.mmdet.detector.weights import StateDict, in_float32
from agvm_ds.mmdet.hooks.ema import replaced
from agvm_ds.mmdet.process.errors import HostError


@dataclass(frozen=True)
class Published:
    """A detector's weights, and what a ``.pth`` of the same moment says of the run."""

    weights: StateDict
    """In float32, on the CPU: the masters, rank 0's buffers, and the averages where an EMA hook had put them."""
    meta: dict[str, Any]
    """epoch (counted from 1), iter (updates), seed."""


def read_published(place: Path) -> Published:
    """Of a folder of DeepSpeed checkpoints (a work dir's ``deepspeed``), of which ``latest`` is taken, or of one in it.

    Every file is compared with the manifest's digests first. Raises HostError when there is no checkpoint,
    CheckpointError when it is damaged, or was not written by launch/train.py.
    """
    vault, tag = _find(place)
    folder = vault.folder / tag
    if problems := vault.damage(tag):
        raise CheckpointError("\n  ".join([f"checkpoint {folder} is damaged:", *problems]))
    manifest = vault.manifest(tag)
    assert manifest is not None, "a checkpoint without one counts as damaged"
    try:
        return _read(WholeState(folder, manifest.layout), manifest)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"checkpoint {folder} holds more than data, and is not read: {error}") from error


def _find(place: Path) -> tuple[Vault, str]:
    if (place / MANIFEST).is_file():
        return Vault(place.parent), place.name
    vault = Vault(place)
    tag = vault.latest()
    if tag is None:
        raise HostError(
            f"{place}: is no DeepSpeed checkpoint of launch/train.py: give WORK_DIR/deepspeed, or a folder in it that has a "
            f"{MANIFEST}"
        )
    if not (place / tag).is_dir():
        others = ", ".join(vault.by_age()) or "none"
        raise CheckpointError(f"{place}/latest names {tag}, which is not there; there are: {others}")
    return vault, tag


def _read(saved: WholeState, manifest: Manifest) -> Published:
    state = saved.common.get(RUNNER_KEY)
    if state is None:
        raise CheckpointError(f"checkpoint {saved.folder} was not written by launch/train.py")
    unrounded = state.get(UNROUNDED, {})
    weights = {name: in_float32(value, unrounded.get(name)) for name, value in saved.weights().items()}
    for averages, published in zip(state["averages"], state.get(AVERAGES_PUBLISHED, []), strict=False):
        weights = replaced(weights, averages if published else {}, unrounded)
    return Published(weights, {"epoch": state["position"][0] + 1, "iter": manifest.update, "seed": manifest.seed})
