# Mask R-CNN R50 FPN at batch 512: 34.6 mask mAP with AGVM, 33.9 without (official repository).
# COCO, 32 GPUs x 16 images. Nobody has run it here at this size.
_base_ = "_base_/mask_rcnn_r50.py"
lr_config = dict(warmup_iters=460)
