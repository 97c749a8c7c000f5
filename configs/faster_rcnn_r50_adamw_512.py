# Faster R-CNN R50 FPN with AdamW at batch 512: the setting of arXiv 2210.11078, whose figures were not at hand.
# COCO, 32 GPUs x 16 images. Nobody has run it here at this size.
# 12 epochs, as in the paper; steps, AdamW's rate (by the square root), decay and betas are those of mmdet's Swin configs.
_base_ = "_base_/faster_rcnn_r50.py"
lr_config = dict(warmup_iters=460, step=[8, 11])
runner = dict(max_epochs=12)
