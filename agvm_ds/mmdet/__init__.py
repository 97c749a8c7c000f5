"""Everything that knows mmdet 2.x or mmcv: detectors trained by mmcv's runner under DeepSpeed, with AGVM."""

from agvm_ds.mmdet.detector.modules import modules_of

__all__ = ["modules_of"]
