# The study's detector: the demo's Faster R-CNN with BatchNorm in its backbone, on 2,048 images, measured on two sets of 512.
# What a run adds (optimizer, schedule, length) is written by benchmarks/study/launch.py, which also makes the data.
_base_ = "../../agvm_ds/demo/faster_rcnn_digits.py"
model = dict(backbone=dict(norm_cfg=dict(_delete_=True, type="BN", requires_grad=True), norm_eval=False))

data_root = "data/study/"
measured = dict(
    type={{_base_.dataset_type}},
    img_prefix=data_root + "digits/val/",
    classes={{_base_.classes}},
    pipeline={{_base_.test_pipeline}},
)
data = dict(
    train=dict(ann_file=data_root + "digits/annotations/train.json", img_prefix=data_root + "digits/train/"),
    val=dict(
        _delete_=True,
        type="ConcatDataset",
        separate_eval=True,
        datasets=[
            dict(ann_file=data_root + "choose.json", **measured),
            dict(ann_file=data_root + "report.json", **measured),
        ],
    ),
)
