# The study's detector with the demo's GroupNorm in its backbone, whose layers know nothing of other images.
_base_ = "detector.py"
model = dict(backbone=dict(norm_cfg=dict(_delete_=True, type="GN", num_groups=4, requires_grad=True)))
