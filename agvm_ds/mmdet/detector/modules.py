"""How a detector is cut into AGVM modules."""

from __future__ import annotations

from torch import nn


def modules_of(detector: nn.Module) -> list[str]:
    """The dotted names of a detector's modules: its top-level children that have parameters.

    ``roi_head`` is replaced by its own children when it has a mask head, as the paper does (AGVM, section 4.1):
    backbone, neck, rpn_head, roi_head.bbox_head, roi_head.mask_head.
    """
    names: list[str] = []
    for name, child in detector.named_children():
        parts = dict(child.named_children())
        cut = name == "roi_head" and "mask_head" in parts
        candidates = {f"{name}.{part}": module for part, module in parts.items()} if cut else {name: child}
        names += [dotted for dotted, module in candidates.items() if any(True for _ in module.parameters())]
    return names
