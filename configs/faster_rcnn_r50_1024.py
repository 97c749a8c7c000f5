# Faster R-CNN R50 FPN at batch 1024, one of the paper's (arXiv 2210.11078). The official repository has no figure
# for it; it aims at batch 32's, 37.1 box mAP. COCO, 64 GPUs x 16 images. Nobody has run it here at this size.
# Learning rate and warm-up are by the rules of agvm_ds.mmdet.planning.scaling that give the official 256 and 512.
_base_ = "_base_/faster_rcnn_r50.py"
lr_config = dict(warmup_iters=230)
