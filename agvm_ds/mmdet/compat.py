"""What mmdet does for a GPU only, or for a run that is never resumed."""

from __future__ import annotations

from functools import partial
from typing import Any

from deepspeed.accelerator import get_accelerator
from mmdet.core.hook import YOLOXModeSwitchHook
from mmdet.core.utils import sync_random_seed
from mmdet.datasets.samplers import class_aware_sampler, infinite_sampler


def mend_mmdet() -> None:
    """Samplers agree on a seed over CUDA tensors, whatever the process group's backend is."""
    for sampler in (infinite_sampler, class_aware_sampler):
        sampler.sync_random_seed = partial(sync_random_seed, device=get_accelerator().device_name())


def repeat_mode_switch(runner: Any, loader: Any) -> None:
    """YOLOXModeSwitchHook acts in one epoch only: a run resumed after it would train with mosaics again, and no L1 loss."""
    for hook in runner.hooks:
        if isinstance(hook, YOLOXModeSwitchHook) and runner.epoch + 1 > runner.max_epochs - hook.num_last_epochs:
            loader.dataset.update_skip_type_keys(hook.skip_type_keys)
            runner.model.module.bbox_head.use_l1 = True
