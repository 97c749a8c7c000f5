# Faster R-CNN R50 FPN at batch 32, the baseline of all: 37.1 box mAP (official repository).
# COCO, 2 GPUs x 16 images. Nobody has run it here at this size.
# The warm-up is 2 epochs, as in the official recipes for 256 and 512; there is none for 32.
_base_ = "_base_/faster_rcnn_r50.py"
lr_config = dict(warmup_iters=7330)
