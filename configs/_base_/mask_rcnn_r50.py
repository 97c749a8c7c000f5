# mmdet's Mask R-CNN R50 FPN on COCO, as the official AGVM repository (github.com/Sense-X/AGVM) changes it: see
# faster_rcnn_r50.py. There the boxes' RoIAlign keeps mmdet's adaptive sampling; the masks' has ratio 2.
from agvm_ds.mmdet.configs import config_path

_base_ = config_path("mask_rcnn/mask_rcnn_r50_fpn_1x_coco")
model = dict(
    backbone=dict(norm_cfg=dict(type="SyncBN"), norm_eval=False),
    rpn_head=dict(
        loss_cls=dict(use_sigmoid=False),
        loss_bbox=dict(_delete_=True, type="SmoothL1Loss", beta=1.0 / 9.0, loss_weight=1.0),
    ),
    roi_head=dict(
        bbox_head=dict(loss_bbox=dict(_delete_=True, type="SmoothL1Loss", beta=1.0, loss_weight=1.0)),
        mask_roi_extractor=dict(roi_layer=dict(sampling_ratio=2)),
    ),
    train_cfg=dict(rpn_proposal=dict(max_per_img=2000)),
    test_cfg=dict(rcnn=dict(score_thr=0.0)),
)
data = dict(samples_per_gpu=16, workers_per_gpu=10)
lr_config = dict(warmup="exp", warmup_ratio=0.001, step=[12, 14])
runner = dict(max_epochs=16)
log_config = dict(interval=10)
