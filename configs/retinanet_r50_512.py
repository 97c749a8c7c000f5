# RetinaNet R50 FPN at batch 512, one of the paper's detectors (arXiv 2210.11078): it aims at mmdet's own 36.5 box mAP of
# batch 16. COCO, 32 GPUs x 16 images. Nobody has run it here at this size.
# Model and 12 epochs are mmdet's, but for the backbone's SyncBN; rate and warm-up are by the rules of
# agvm_ds.mmdet.planning.scaling.
from agvm_ds.mmdet.configs import config_path

_base_ = config_path("retinanet/retinanet_r50_fpn_1x_coco")
model = dict(backbone=dict(norm_cfg=dict(type="SyncBN"), norm_eval=False))
data = dict(samples_per_gpu=16, workers_per_gpu=10)
lr_config = dict(warmup="exp", warmup_iters=460, warmup_ratio=0.001)
log_config = dict(interval=10)
