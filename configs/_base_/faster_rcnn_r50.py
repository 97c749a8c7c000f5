# mmdet's Faster R-CNN R50 FPN on COCO, as the official AGVM repository (github.com/Sense-X/AGVM) changes it: SyncBN trained
# in the backbone, softmax in the RPN, smooth L1 losses, 2000 proposals, 16 epochs with steps at 12 and 14.
# The learning rate is in each run's DeepSpeed JSON, the warm-up's length, in updates, in the file of each batch. The JSONs
# estimate by "split", as the official code does: a published figure is aimed at with the method that gave it.
from agvm_ds.mmdet.configs import config_path

_base_ = config_path("faster_rcnn/faster_rcnn_r50_fpn_1x_coco")
model = dict(
    backbone=dict(norm_cfg=dict(type="SyncBN"), norm_eval=False),
    rpn_head=dict(
        loss_cls=dict(use_sigmoid=False),
        loss_bbox=dict(_delete_=True, type="SmoothL1Loss", beta=1.0 / 9.0, loss_weight=1.0),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=dict(sampling_ratio=2)),
        bbox_head=dict(loss_bbox=dict(_delete_=True, type="SmoothL1Loss", beta=1.0, loss_weight=1.0)),
    ),
    train_cfg=dict(rpn_proposal=dict(max_per_img=2000)),
    test_cfg=dict(rcnn=dict(score_thr=0.0)),
)
data = dict(samples_per_gpu=16, workers_per_gpu=10)
lr_config = dict(warmup="exp", warmup_ratio=0.001, step=[12, 14])
runner = dict(max_epochs=16)
log_config = dict(interval=10)
