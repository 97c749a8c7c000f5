# Faster R-CNN R50 FPN with AdamW at batch 1024: the setting of arXiv 2210.11078, whose figure was not at hand.
# COCO, 64 GPUs x 16 images. Nobody has run it here at this size. The rest is as at batch 512.
_base_ = "faster_rcnn_r50_adamw_512.py"
lr_config = dict(warmup_iters=230)
