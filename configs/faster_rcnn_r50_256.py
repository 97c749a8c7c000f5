# Faster R-CNN R50 FPN at batch 256: 37.1 box mAP with AGVM, 36.7 without (official repository).
# COCO, 16 GPUs x 16 images. Nobody has run it here at this size.
_base_ = "_base_/faster_rcnn_r50.py"
lr_config = dict(warmup_iters=920)
