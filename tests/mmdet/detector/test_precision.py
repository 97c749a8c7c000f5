"""A detector in half precision: BatchNorm's arithmetic, and mmdet's own functions in bfloat16."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from mmcv.ops import SyncBatchNorm
from mmcv.runner import auto_fp16, force_fp32, fp16_utils
from mmdet.models import build_backbone
from torch import nn

from agvm_ds.mmdet.detector.precision import TYPES, enable_half


@pytest.fixture(autouse=True)
def _mmcvs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What enable_half teaches mmcv is taken back."""
    for name in ("autocast", "cast_tensor_type"):
        monkeypatch.setattr(fp16_utils, name, getattr(fp16_utils, name))


def halved(module: nn.Module, kind: str) -> nn.Module:
    """As in a run: mmdet's functions cast, and DeepSpeed casts the parameters alone."""
    enable_half(module, kind)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(TYPES[kind])
    return module


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settings", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}])
def test_batch_norm_computes_in_float32_and_keeps_float32_statistics(
    settings: dict[str, Any], training: bool, kind: str
) -> None:
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(3, **settings).train(training)
    if plain.affine:
        nn.init.normal_(plain.weight)
        nn.init.normal_(plain.bias)
    half = halved(copy.deepcopy(plain), kind)
    plain.load_state_dict(half.state_dict())  # the same rounded weights
    images = torch.randn(4, 3, 5, 5).to(TYPES[kind])
    inputs = [images.float().requires_grad_(), images.clone().requires_grad_()]
    outputs = [norm(one) for norm, one in zip((plain, half), inputs, strict=True)]
    close = partial(torch.testing.assert_close, rtol=2.0**-7, atol=2.0**-7)
    assert outputs[1].dtype == TYPES[kind]
    close(outputs[1].float(), outputs[0])
    for output in outputs:
        (output.float() ** 3).sum().backward()
    for name, buffer in plain.named_buffers():
        assert half.get_buffer(name).dtype == buffer.dtype
        torch.testing.assert_close(half.get_buffer(name), buffer)
    for mine, theirs in zip([*half.parameters(), inputs[1]], [*plain.parameters(), inputs[0]], strict=True):
        assert mine.grad is not None and theirs.grad is not None and mine.grad.dtype == TYPES[kind]
        assert (mine.grad.float() - theirs.grad).norm() <= 2.0**-6 * theirs.grad.norm()


def test_statistics_that_deepspeed_was_told_to_cast_go_with_weights_of_their_type() -> None:
    norm = halved(nn.BatchNorm2d(3), "bf16").bfloat16()
    norm(torch.randn(2, 3, 4, 4).bfloat16()).sum().backward()
    assert norm.get_buffer("running_mean").dtype == torch.bfloat16 and norm.get_buffer("running_mean").any()


def test_mmcvs_sync_bn_has_float32_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel is a GPU's: what its forward is given is looked at."""
    seen: list[Any] = []
    monkeypatch.setattr(SyncBatchNorm, "__init__", lambda self: nn.Module.__init__(self))
    monkeypatch.setattr(SyncBatchNorm, "forward", lambda self, images: seen.extend([self.weight, self.bias]))
    norm = SyncBatchNorm()
    norm.running_mean = None
    norm.weight, norm.bias = (nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2))
    enable_half(norm, "bf16")
    norm(torch.ones(1, 3, 2, 2))
    assert [one.dtype for one in seen] == [torch.float32] * 2 and norm.weight.dtype == torch.bfloat16


def test_a_copy_computes_with_its_own_weights() -> None:
    norm = halved(nn.BatchNorm2d(3), "bf16")
    other = copy.deepcopy(norm)
    nn.init.zeros_(other.weight)
    images = torch.randn(2, 3, 4, 4).bfloat16()
    assert not other(images).any() and norm(images).any()


class Marked(nn.Module):
    """Functions that are marked as mmdet's are."""

    def __init__(self) -> None:
        super().__init__()
        self.fp16_enabled = False
        self.layer = nn.Linear(4, 4)

    @auto_fp16()
    def forward(self, x: torch.Tensor) -> Any:
        """Two layers and what mixes types between them, as Swin's attention mask does."""
        mixed = self.layer(x) + torch.zeros(4)
        return self.layer(mixed), self.loss(mixed)

    @force_fp32()
    def loss(self, x: torch.Tensor) -> Any:
        """As a head's."""
        return x.dtype, (x @ x.transpose(0, 1)).dtype


@pytest.mark.parametrize("kind", TYPES)
def test_marked_functions_cast_and_types_may_be_mixed_between_layers(kind: str) -> None:
    output, in_loss = halved(Marked(), kind)(torch.randn(2, 4))
    assert output.dtype == TYPES[kind] and in_loss == (torch.float32, torch.float32)


BACKBONES = {
    "ResNet": {"type": "ResNet", "depth": 18, "norm_cfg": {"type": "BN"}, "frozen_stages": 1, "norm_eval": True},
    "Swin": {
        "type": "SwinTransformer",
        "embed_dims": 12,
        "depths": (2, 2, 2, 2),
        "num_heads": (1, 2, 2, 2),
        "window_size": 4,
    },
}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_trains_in_bfloat16(name: str) -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = build_backbone(BACKBONES[name])
            self.fp16_enabled = False

        @auto_fp16()
        def forward(self, images: torch.Tensor) -> Any:
            return self.backbone(images)

    detector = halved(Detector(), "bf16").train()
    found = detector(torch.randn(2, 3, 64, 64))
    sum(level.float().square().mean() for level in found).backward()
    gradients = [p.grad for p in detector.parameters() if p.requires_grad and p.grad is not None]
    assert len(gradients) > 20 and all(bool(gradient.isfinite().all()) for gradient in gradients)
