# A small Faster R-CNN for the built-in digits: an ordinary mmdet 2.x configuration, for mmdet's own tools too.
# It trains from scratch in minutes without a GPU. The data: python -m agvm_ds.demo.data data/digits
# GroupNorm: a micro-batch of 4 images is too small for BatchNorm's statistics.
norm_cfg = dict(type="GN", num_groups=4, requires_grad=True)
model = dict(
    type="FasterRCNN",
    backbone=dict(
        type="ResNet",
        depth=18,
        base_channels=16,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(0, 1, 2),
        norm_cfg=norm_cfg,
        norm_eval=False,
    ),
    neck=dict(type="FPN", in_channels=[16, 32, 64], out_channels=32, num_outs=3),
    rpn_head=dict(
        type="RPNHead",
        in_channels=32,
        feat_channels=32,
        anchor_generator=dict(type="AnchorGenerator", scales=[6], ratios=[1.0, 2.0], strides=[4, 8, 16]),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[1.0] * 4),
        loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
        loss_bbox=dict(type="L1Loss", loss_weight=1.0),
    ),
    roi_head=dict(
        type="StandardRoIHead",
        bbox_roi_extractor=dict(
            type="SingleRoIExtractor",
            roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=1),
            out_channels=32,
            featmap_strides=[4, 8, 16],
        ),
        bbox_head=dict(
            type="Shared2FCBBoxHead",
            in_channels=32,
            fc_out_channels=128,
            roi_feat_size=7,
            num_classes=10,
            reg_class_agnostic=True,
            bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2]),
            loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type="L1Loss", loss_weight=2.0),
        ),
    ),
    train_cfg=dict(
        rpn=dict(
            assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3),
            sampler=dict(type="RandomSampler", num=64, pos_fraction=0.5, add_gt_as_proposals=False),
            allowed_border=-1,
            pos_weight=-1,
        ),
        rpn_proposal=dict(nms_pre=200, max_per_img=64, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(
            assigner=dict(
                type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5, match_low_quality=False
            ),
            sampler=dict(type="RandomSampler", num=32, pos_fraction=0.5, add_gt_as_proposals=True),
            pos_weight=-1,
        ),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=200, max_per_img=64, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=100),
    ),
)

dataset_type = "CocoDataset"
data_root = "data/digits/"
classes = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
img_norm_cfg = dict(mean=[127.5, 127.5, 127.5], std=[64.0, 64.0, 64.0], to_rgb=True)
# No flip: the mirror image of a digit is no digit.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", img_scale=(96, 96), keep_ratio=True),
    dict(type="RandomFlip", flip_ratio=0.0),
    dict(type="Normalize", **img_norm_cfg),
    dict(type="Pad", size_divisor=16),
    dict(type="DefaultFormatBundle"),
    dict(type="Collect", keys=["img", "gt_bboxes", "gt_labels"]),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="MultiScaleFlipAug",
        img_scale=(96, 96),
        flip=False,
        transforms=[
            dict(type="Resize", keep_ratio=True),
            dict(type="RandomFlip"),
            dict(type="Normalize", **img_norm_cfg),
            dict(type="Pad", size_divisor=16),
            dict(type="ImageToTensor", keys=["img"]),
            dict(type="Collect", keys=["img"]),
        ],
    ),
]
data = dict(
    samples_per_gpu=4,
    workers_per_gpu=0,  # reading these small images costs less than handing them over
    train=dict(
        type=dataset_type,
        ann_file=data_root + "annotations/train.json",
        img_prefix=data_root + "train/",
        classes=classes,
        pipeline=train_pipeline,
    ),
    val=dict(
        type=dataset_type,
        ann_file=data_root + "annotations/val.json",
        img_prefix=data_root + "val/",
        classes=classes,
        pipeline=test_pipeline,
    ),
    test=dict(
        type=dataset_type,
        ann_file=data_root + "annotations/val.json",
        img_prefix=data_root + "val/",
        classes=classes,
        pipeline=test_pipeline,
    ),
)
evaluation = dict(interval=3, metric="bbox")

# For a global batch of 16 images, so 128 updates an epoch. A short training wants a short memory: betas[1] is 0.99.
optimizer = dict(type="AdamW", lr=6e-3, betas=(0.9, 0.99), weight_decay=0.05)
optimizer_config = dict(grad_clip=dict(max_norm=10))
lr_config = dict(
    policy="CosineAnnealing", by_epoch=False, min_lr_ratio=0.01, warmup="linear", warmup_iters=64, warmup_ratio=0.01
)
runner = dict(type="EpochBasedRunner", max_epochs=6)

checkpoint_config = dict(interval=1, max_keep_ckpts=2)
log_config = dict(interval=32, hooks=[dict(type="TextLoggerHook")])
custom_hooks = [dict(type="NumClassCheckHook")]
dist_params = dict(backend="gloo")
log_level = "INFO"
load_from = None
resume_from = None
workflow = [("train", 1)]
