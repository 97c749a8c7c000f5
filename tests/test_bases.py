"""How a DeepSpeed JSON names AGVM's base, and which optimizers are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from torch.optim import Optimizer

from agvm_ds import AGVM, ConfigError, bases, param_groups
from agvm_ds.bases import base_from_json, preconditioned, problem_of, warning_of
from tests.toy import Toy

OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
ADAMW, ADAM = torch.optim.AdamW, torch.optim.Adam


@pytest.mark.parametrize(
    ("block", "base", "options"),
    [
        ({"type": "SGD", "params": {"lr": 0.1}}, torch.optim.SGD, {"lr": 0.1}),
        ({"type": "sgd"}, torch.optim.SGD, {}),
        ({"type": "rmsprop", "params": {"alpha": 0.9}}, torch.optim.RMSprop, {"alpha": 0.9}),
        ({"type": "NAdam", "params": None}, torch.optim.NAdam, {}),
        ({"type": "Adagrad"}, torch.optim.Adagrad, {}),
        ({"type": "Lamb"}, FusedLamb, {}),
        ({"type": "Lion"}, FusedLion, {}),
        ({"type": "Adam", "params": {"torch_adam": True}}, ADAMW, {}),
        ({"type": "Adam", "params": {"torch_adam": True, "adam_w_mode": False}}, ADAM, {}),
        ({"type": "AdamW", "params": {"torch_adam": True, "adam_w_mode": False}}, ADAMW, {}),
    ],
    ids=str,
)
def test_a_base_is_named_as_deepspeed_names_it(
    block: dict[str, Any], base: type[Optimizer], options: dict[str, Any]
) -> None:
    before = copy.deepcopy(block)
    assert base_from_json({"optimizer": block}) == (base, options)
    assert block == before, "the user's configuration is left alone"


@pytest.mark.parametrize(
    ("device", "params", "base", "options"),
    [
        ("cpu", {"lr": 0.1}, ADAMW, {"lr": 0.1, "weight_decay": 0.0}),
        ("cpu", {"weight_decay": 0.3}, ADAMW, {"weight_decay": 0.3}),
        ("cpu", {"adam_w_mode": False, "bias_correction": True}, ADAM, {"weight_decay": 0.0}),
        ("cpu", {"bias_correction": False}, FusedAdam, {"bias_correction": False, "adam_w_mode": True}),
        ("cuda", {"lr": 0.1}, FusedAdam, {"lr": 0.1, "adam_w_mode": True}),
        ("cuda", {"adam_w_mode": False}, FusedAdam, {"adam_w_mode": False}),
    ],
)
def test_an_adam_is_deepspeeds_own_where_there_is_a_gpu(
    device: str, params: dict[str, Any], base: type, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(bases.get_accelerator()), "device_name", lambda self, index=None: device)
    assert base_from_json({"optimizer": {"type": "Adam", "params": params}}) == (base, options)


@pytest.mark.parametrize(
    ("block", "base", "options"),
    [
        ({"type": "Adam"}, DeepSpeedCPUAdam, {"adamw_mode": True}),
        ({"type": "Adam", "params": {"adam_w_mode": False}}, DeepSpeedCPUAdam, {"adamw_mode": False}),
        ({"type": "AdamW", "params": {"torch_adam": True}}, ADAMW, {}),
        ({"type": "Adagrad"}, DeepSpeedCPUAdagrad, {}),
        ({"type": "Lion"}, DeepSpeedCPULion, {}),
    ],
    ids=str,
)
def test_offload_means_deepspeeds_cpu_optimizers(
    block: dict[str, Any], base: type[Optimizer], options: dict[str, Any]
) -> None:
    assert base_from_json({"optimizer": block, **OFFLOAD}) == (base, options)


@pytest.mark.parametrize(
    "name", ["OneBitAdam", "onebitadam", "ZeroOneAdam", "OneBitLamb", "Muon", "LBFGS", "Adafactor"]
)
def test_a_base_that_cannot_be_modulated_is_refused_with_the_reason(name: str) -> None:
    reason = next(why for key, why in bases.REFUSED.items() if key.lower() == name.lower())
    with pytest.raises(ConfigError, match=f"optimizer.type = '{name}': not supported with AGVM: {reason}"):
        base_from_json({"optimizer": {"type": name}})


@pytest.mark.parametrize("block", [{"type": "Sdg"}, {"params": {"lr": 0.1}}], ids=str)
def test_a_name_that_is_not_known_is_a_mistake(block: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="optimizer.type = .*: not known; allowed: ASGD, .*, SGD"):
        base_from_json({"optimizer": block})


def test_the_old_key_of_clipping_is_named() -> None:
    with pytest.raises(ConfigError, match="max_grad_norm: DeepSpeed's key for this is gradient_clipping"):
        base_from_json({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1.0}}})


@pytest.mark.parametrize("base", [torch.optim.LBFGS, torch.optim.Muon, torch.optim.Rprop], ids=lambda b: b.__name__)
def test_a_class_that_cannot_be_modulated_is_refused(base: type[Optimizer]) -> None:
    with pytest.raises(ConfigError, match=f"base optimizer {base.__name__}: not supported with AGVM: "):
        AGVM(param_groups(Toy()), base=base, lr=0.1)


def test_every_class_of_torch_is_accepted_or_refused() -> None:
    found = {name for name, value in vars(torch.optim).items() if isinstance(value, type)} - {"Optimizer"}
    assert found == {b.__name__ for b in bases.ELEMENTWISE if b.__module__.startswith("torch.optim")} | (
        found & set(bases.REFUSED)
    )


def test_only_adams_are_preconditioned() -> None:
    assert {b.__name__ for b in bases.ELEMENTWISE if preconditioned(b)} == {
        "Adam",
        "AdamW",
        "FusedAdam",
        "DeepSpeedCPUAdam",
    }


class Signs(torch.optim.SGD):
    """An optimizer of the user's own."""


class Ours(Optimizer):
    """One that says nothing of itself."""


def test_lamb_and_unknown_bases_are_warned_about() -> None:
    assert "norms are those of a rank's shard" in str(warning_of(FusedLamb, 1))
    assert warning_of(FusedLamb, 0) is None
    assert warning_of(Signs, 3) is None
    assert "must treat each element by itself" in str(warning_of(Ours, 0))
    assert [problem_of(base) for base in (FusedLamb, Signs, Ours, *bases.ELEMENTWISE)] == [None] * (
        3 + len(bases.ELEMENTWISE)
    )
