"""LAMB and LARS as timm has them, under names that an mmdet config can use."""

from mmcv.runner import OPTIMIZERS
from timm.optim import Lamb, Lars

OPTIMIZERS.register_module(module=Lamb, force=True)
OPTIMIZERS.register_module(module=Lars, force=True)
