# Mask R-CNN R50 FPN at batch 256: 35.0 mask mAP with AGVM, 34.4 without (official repository).
# COCO, 16 GPUs x 16 images. Nobody has run it here at this size.
_base_ = "_base_/mask_rcnn_r50.py"
lr_config = dict(warmup_iters=920)
