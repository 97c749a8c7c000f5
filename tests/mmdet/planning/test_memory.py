"""The estimate of agvm_ds.mmdet.planning.memory: its count of activations against a real forward, its arithmetic by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from mmdet.models import build_detector
from torch import nn

from agvm_ds.mmdet.configs import read_config
from agvm_ds.mmdet.planning.memory import (
    IMAGES,
    Footprint,
    footprint,
    image_size,
    moments_of,
    needs,
    saved_for_backward,
)

SIZES = Footprint(parameters=1000, trainable=800, largest_layer=100, saved=None, note="")
BUFFER = 500_000_000 * 4


def really_saved(detector: Any, size: tuple[int, int]) -> int:
    """Bytes an image that autograd saves in a forward on the CPU."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        detector.rpn_head(detector.extract_feat(torch.randn(IMAGES, 3, *size)))
    return sum(storage.nbytes() for storage in storages.values()) // IMAGES


def test_activations_on_the_meta_device_are_those_of_a_real_forward() -> None:
    cfg = read_config(None)
    detector = build_detector(cfg.model).train()
    real = really_saved(detector, (96, 96))
    counted, note = saved_for_backward(detector.to("meta"), (96, 96))
    assert real > 1_000_000
    assert counted == pytest.approx(real, rel=0.01)  # the CPU's GroupNorm and convolution may save a few numbers more
    assert note == "saved by backbone, neck, rpn_head for an image of 96 x 96, on the meta device"


def test_a_detector_that_the_meta_device_cannot_run_is_not_estimated() -> None:
    class Odd(nn.Module):
        def extract_feat(self, images: torch.Tensor) -> float:
            return images.sum().item()

    saved, note = saved_for_backward(Odd(), (32, 32))
    assert saved is None and note.startswith("the detector does not run on the meta device: RuntimeError")
    assert saved_for_backward(Odd(), None) == (None, "no img_scale in the training pipeline")


def test_parameters_are_counted_before_the_meta_device_hides_which_are_shared() -> None:
    sizes = footprint(read_config("faster_rcnn_r50_fpn_1x_coco"))
    detector = build_detector(read_config("faster_rcnn_r50_fpn_1x_coco").model)
    assert sizes.parameters == sum(p.numel() for p in detector.parameters()) > sizes.trainable > 40e6
    assert sizes.largest_layer == 256 * 7 * 7 * 1024 + 1024  # the first layer of the box head


def test_the_image_is_the_largest_of_the_pipeline_padded() -> None:
    assert image_size(read_config("faster_rcnn_r50_fpn_1x_coco")) == (800, 1344)
    assert image_size(read_config("mask_rcnn_r50_fpn_mstrain-poly_3x_coco")) == (800, 1344)
    assert image_size(read_config(None)) == (96, 96)
    assert image_size(read_config(None, {"data.train.pipeline": [{"type": "LoadImageFromFile"}]})) is None


@pytest.mark.parametrize(
    ("stage", "states", "buffer"), [(0, 10400, 0), (1, 9600, BUFFER), (2, 6400, BUFFER), (3, 3800, BUFFER)]
)
def test_states_by_stage(stage: int, states: int, buffer: int) -> None:
    """By hand for 1000 parameters, 800 of them trained, momentum, four ranks: 4000 bytes of weights, 3200 of gradients."""
    held = needs(SIZES, stage, nodes=2, gpus=2, moments=1, elementwise=False)
    assert (held.states, held.bucket, held.agvm) == (states, buffer, 0)


def test_the_larger_of_ours_and_deepspeeds_estimate_counts() -> None:
    held = needs(SIZES, 2, 1, 2, moments=1, elementwise=False)
    theirs = estimate_zero2_model_states_mem_needs(1000, 2, 1, cpu_offload=False)[1]
    assert (held.deepspeed, held.total) == (theirs, theirs + BUFFER) and theirs > held.states
    assert needs(SIZES, 1, 1, 2, 1, False).deepspeed is None
    assert needs(SIZES, 3, 1, 2, 1, False).deepspeed == 4 * 100 + 18 * 1000 // 2


def test_an_elementwise_quantity_takes_a_bucket_and_a_shard() -> None:
    assert needs(SIZES, 2, 2, 2, moments=2, elementwise=True).agvm == 800 * 4 + 800


@pytest.mark.parametrize(
    ("base", "options", "moments"),
    [
        ("SGD", {}, 0),
        ("SGD", {"momentum": 0.9}, 1),
        ("AdamW", {}, 2),
        ("Adagrad", {}, 1),
        ("RMSprop", {"momentum": 0.9}, 2),
    ],
)
def test_states_of_an_optimizer(base: str, options: dict[str, Any], moments: int) -> None:
    assert moments_of(getattr(torch.optim, base), options) == moments
