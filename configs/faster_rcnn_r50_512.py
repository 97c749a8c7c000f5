# Faster R-CNN R50 FPN at batch 512: 36.8 box mAP with AGVM, 36.2 without (official repository).
# COCO, 32 GPUs x 16 images. Nobody has run it here at this size.
_base_ = "_base_/faster_rcnn_r50.py"
lr_config = dict(warmup_iters=460)
