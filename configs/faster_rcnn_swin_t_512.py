# Faster R-CNN Swin-T FPN with AdamW at batch 512. The paper (arXiv 2210.11078) measures gradient variances on it; the
# aim is no loss against batch 16. COCO, 32 GPUs x 16 images. Nobody has run it here at this size.
# Backbone, optimizer and 12 epochs are those of mmdet's Mask R-CNN Swin-T; AdamW's rate is scaled by the square root.
import mmcv

from agvm_ds.mmdet.configs import config_path

_base_ = config_path("faster_rcnn/faster_rcnn_r50_fpn_1x_coco")
swin = mmcv.Config.fromfile(config_path("swin/mask_rcnn_swin-t-p4-w7_fpn_1x_coco"))
model = dict(backbone=dict(_delete_=True, **swin.model.backbone), neck=dict(in_channels=swin.model.neck.in_channels))
optimizer = dict(_delete_=True, **swin.optimizer)
del swin  # a name left here is a key of the config
data = dict(samples_per_gpu=16, workers_per_gpu=10)
lr_config = dict(warmup="exp", warmup_iters=460, warmup_ratio=0.001)
log_config = dict(interval=10)
