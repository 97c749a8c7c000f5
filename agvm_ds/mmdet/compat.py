"""What mmdet does with a GPU in mind, mended in place for the device of this run."""

from __future__ import annotations

from functools import partial

from deepspeed.accelerator import get_accelerator
from mmdet.core.utils import sync_random_seed
from mmdet.datasets.samplers import class_aware_sampler, infinite_sampler


def mend_mmdet() -> None:
    """Samplers agree on a seed over CUDA tensors, whatever the process group's backend is."""
    for sampler in (infinite_sampler, class_aware_sampler):
        sampler.sync_random_seed = partial(sync_random_seed, device=get_accelerator().device_name())
