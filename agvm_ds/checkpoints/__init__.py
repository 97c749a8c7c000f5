"""DeepSpeed checkpoints that are whole or not there, that say when they are damaged, and that fit another run's layout."""

from __future__ import annotations

from agvm_ds.checkpoints.layout import Layout, Placed, layout_of
from agvm_ds.checkpoints.reshard import load_into
from agvm_ds.checkpoints.safety import any_pickle, weights_only
from agvm_ds.checkpoints.vault import CheckpointError, Manifest, NotWrittenError, Vault
from agvm_ds.checkpoints.whole import WholeState

__all__ = [
    "CheckpointError",
    "Layout",
    "Manifest",
    "NotWrittenError",
    "Placed",
    "Vault",
    "WholeState",
    "any_pickle",
    "layout_of",
    "load_into",
    "weights_only",
]
