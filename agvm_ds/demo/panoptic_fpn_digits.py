# A small Panoptic FPN for the built-in digits, which are things, on photographs, which are stuff.
# mmdet reads and evaluates panoptic annotations with panopticapi:
#     pip install git+https://github.com/cocodataset/panopticapi.git
_base_ = "mask_rcnn_digits.py"
model = dict(
    type="PanopticFPN",
    semantic_head=dict(
        type="PanopticFPNHead",
        num_things_classes=10,
        num_stuff_classes=1,
        in_channels=32,
        inner_channels=32,
        start_level=0,
        end_level=3,
        norm_cfg=dict(type="GN", num_groups=4, requires_grad=True),
        loss_seg=dict(type="CrossEntropyLoss", ignore_index=255, loss_weight=0.5),
    ),
    panoptic_fusion_head=dict(type="HeuristicFusionHead", num_things_classes=10, num_stuff_classes=1),
    test_cfg=dict(
        panoptic=dict(
            score_thr=0.5,
            max_per_img=100,
            mask_thr_binary=0.5,
            mask_overlap=0.5,
            nms=dict(type="nms", iou_threshold=0.5, class_agnostic=True),
            stuff_area_limit=64,
        )
    ),
)

data_root = "data/digits/"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadPanopticAnnotations", with_bbox=True, with_mask=True, with_seg=True),
    dict(type="Resize", img_scale=(96, 96), keep_ratio=True),
    dict(type="RandomFlip", flip_ratio=0.0),
    dict(type="Normalize", mean=[127.5, 127.5, 127.5], std=[64.0, 64.0, 64.0], to_rgb=True),
    dict(type="Pad", size_divisor=16),
    dict(type="SegRescale", scale_factor=1 / 4),
    dict(type="DefaultFormatBundle"),
    dict(type="Collect", keys=["img", "gt_bboxes", "gt_labels", "gt_masks", "gt_semantic_seg"]),
]
classes = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "photograph")
data = dict(
    train=dict(
        type="CocoPanopticDataset",
        ann_file=data_root + "annotations/panoptic_train.json",
        seg_prefix=data_root + "panoptic_train/",
        classes=classes,
        pipeline=train_pipeline,
    ),
    val=dict(
        type="CocoPanopticDataset",
        ann_file=data_root + "annotations/panoptic_val.json",
        seg_prefix=data_root + "panoptic_val/",
        classes=classes,
    ),
    test=dict(
        type="CocoPanopticDataset",
        ann_file=data_root + "annotations/panoptic_val.json",
        seg_prefix=data_root + "panoptic_val/",
        classes=classes,
    ),
)
evaluation = dict(metric=["PQ"])
custom_hooks = None  # NumClassCheckHook would count the photograph among the box head's classes
