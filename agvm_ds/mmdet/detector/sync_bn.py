"""SyncBN, whose statistics are those of a micro-step's images on all ranks: it trains on a GPU alone."""

from __future__ import annotations

from deepspeed.accelerator import get_accelerator
from mmcv.cnn.utils import revert_sync_batchnorm
from mmcv.ops import SyncBatchNorm as MMSyncBatchNorm
from torch import nn

from agvm_ds.config import ConfigError

SYNC_BN = (nn.SyncBatchNorm, MMSyncBatchNorm)


def settle_sync_bn(detector: nn.Module, revert: bool) -> list[str]:
    """Put BN, with the same parameters and buffers, where a detector has SyncBN, if ``revert``; in place, before DeepSpeed.

    In evaluation SyncBN is BN, on a CPU too. Returns a note for the log. Raises ConfigError for SyncBN that is to train on
    a CPU.
    """
    synced = sum(isinstance(module, SYNC_BN) for module in detector.modules())
    if synced and revert:
        revert_sync_batchnorm(detector)
        return [f"--revert-sync-bn: {synced} layers of SyncBN train as BN"]
    if synced and get_accelerator().device_name() == "cpu":
        raise ConfigError(
            "the detector has SyncBN, which needs a GPU to train: with --revert-sync-bn it trains with BN, whose statistics "
            "are those of each micro-batch; or set norm_cfg.type to GN"
        )
    return []
