"""AGVM as a torch optimizer, without a process group."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, StepLR

import agvm_ds
from agvm_ds import AGVM, ConfigError, param_groups
from agvm_ds.engine import make_optimizer
from tests.toy import Toy, micro_batch

BASES: dict[type[Optimizer], dict[str, Any]] = {
    torch.optim.SGD: {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    torch.optim.AdamW: {"lr": 0.003, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
}
FACTORS = {"backbone": 1.0, "neck": 0.5, "rpn_head": 2.0, "roi_head": 1.25, "rest": 3.0, "aux_head": 0.75}

both_bases = pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)


def made(base: type[Optimizer], model: Toy, attached: bool = True) -> AGVM:
    optimizer = AGVM(param_groups(model), base=base, **BASES[base])
    optimizer.attached = attached
    return optimizer


def gradients(model: Toy, t: int) -> None:
    model.zero_grad()
    model(*micro_batch(t, 0)).backward()


def train(model: Toy, optimizer: Optimizer, updates: range, factors: dict[str, float] | None = None) -> None:
    """Step; an AGVM with ``factors``, a plain optimizer whose groups carry them with rates multiplied by hand."""
    for t in updates:
        gradients(model, t)
        if isinstance(optimizer, AGVM):
            with optimizer.modulated(factors or {}):
                optimizer.step()
        else:
            optimizer.step()


def equal(one: Toy, other: Toy) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@both_bases
def test_it_is_an_instance_of_its_base(base: type[Optimizer]) -> None:
    optimizer = made(base, Toy())
    assert isinstance(optimizer, AGVM)
    assert isinstance(optimizer, base)
    assert isinstance(optimizer, Optimizer)
    assert type(optimizer) is type(made(base, Toy())), "one class a base"
    assert optimizer.modules == ["rest", "backbone", "neck", "rpn_head", "roi_head", "aux_head"]


def test_the_default_base_is_sgd() -> None:
    assert isinstance(AGVM(param_groups(Toy()), lr=0.1), torch.optim.SGD)


@both_bases
def test_a_step_before_attach_is_refused(base: type[Optimizer]) -> None:
    model = Toy()
    optimizer = made(base, model, attached=False)
    gradients(model, 0)
    with pytest.raises(
        RuntimeError, match=r"before agvm_ds\.attach\(engine\): call it once, after deepspeed.initialize"
    ):
        optimizer.step()
    assert equal(model, Toy())


@both_bases
def test_a_step_with_zero_gradients_may_come_before_attach(base: type[Optimizer]) -> None:
    """DeepSpeed lets a base create its state this way, while it builds the engine."""
    model = Toy()
    optimizer = made(base, model, attached=False)
    optimizer.step()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert len(optimizer.state) == 14


@both_bases
def test_without_factors_it_is_its_base(base: type[Optimizer]) -> None:
    one, other = Toy(), Toy()
    train(one, made(base, one), range(4))
    train(other, base(param_groups(other), **BASES[base]), range(4))
    assert equal(one, other)


@both_bases
def test_a_modulated_step_is_the_bases_with_its_rates_multiplied(base: type[Optimizer]) -> None:
    one, other = Toy(), Toy()
    groups = param_groups(other)
    for group in groups:
        group["lr"] = BASES[base]["lr"] * FACTORS[group["module"]]
    train(one, made(base, one), range(4), FACTORS)
    train(other, base(groups, **BASES[base]), range(4))
    assert equal(one, other)


def test_a_module_without_a_factor_keeps_its_rate() -> None:
    one, other = Toy(), Toy()
    groups = param_groups(other)
    for group in groups:
        group["lr"] = 0.05 * (2.0 if group["module"] == "neck" else 1.0)
    train(one, made(torch.optim.SGD, one), range(2), {"neck": 2.0})
    train(other, torch.optim.SGD(groups, **BASES[torch.optim.SGD]), range(2))
    assert equal(one, other)


def test_factors_end_with_their_context() -> None:
    one, other = Toy(), Toy()
    optimizer = made(torch.optim.SGD, one)
    with pytest.raises(ZeroDivisionError), optimizer.modulated(FACTORS):
        1 / 0  # noqa: B018
    train(one, optimizer, range(2))
    train(other, torch.optim.SGD(param_groups(other), **BASES[torch.optim.SGD]), range(2))
    assert equal(one, other)


def test_afterwards_the_very_same_rates_are_shown() -> None:
    """Saved and put back, not multiplied and divided: 1.1 * 1.1 / 1.1 is not 1.1."""
    model = Toy()
    optimizer = made(torch.optim.SGD, model)
    for group, lr in zip(optimizer.param_groups, (1.1, 0.1, 0.3, 0.7, 1e-3, 1 / 3), strict=True):
        group["lr"] = lr
    train(model, optimizer, range(2), dict.fromkeys(FACTORS, 1.1))
    assert [group["lr"] for group in optimizer.param_groups] == [1.1, 0.1, 0.3, 0.7, 1e-3, 1 / 3]


def test_the_rates_are_shown_again_when_the_step_raises() -> None:
    model = Toy()
    optimizer = made(torch.optim.SGD, model)

    def broken() -> float:
        assert optimizer.param_groups[0]["lr"] == 0.05 * 3.0, "the closure runs inside the modulated step"
        raise OSError("no data")

    gradients(model, 0)
    with pytest.raises(OSError, match="no data"), optimizer.modulated(FACTORS):
        optimizer.step(broken)
    assert {group["lr"] for group in optimizer.param_groups} == {0.05}


def test_a_closure_is_called_and_its_loss_returned() -> None:
    model = Toy()
    optimizer = made(torch.optim.SGD, model)

    def closure() -> torch.Tensor:
        gradients(model, 0)
        return torch.tensor(2.5)

    assert float(optimizer.step(closure)) == 2.5
    assert not equal(model, Toy())


SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "StepLR": lambda optimizer: StepLR(optimizer, 2, 0.1),
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda t: 1 / (t + 1)),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, 0.2, total_steps=6),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_read_and_write_unmodulated_rates(name: str) -> None:
    one, other = Toy(), Toy()
    agvm, plain = made(torch.optim.SGD, one), torch.optim.SGD(param_groups(other), **BASES[torch.optim.SGD])
    schedules = SCHEDULERS[name](agvm), SCHEDULERS[name](plain)
    for t in range(5):
        train(one, agvm, range(t, t + 1), FACTORS)
        shown = [group["lr"] for group in plain.param_groups]
        for group in plain.param_groups:
            group["lr"] *= FACTORS[group["module"]]
        train(other, plain, range(t, t + 1))
        for group, lr in zip(plain.param_groups, shown, strict=True):
            group["lr"] = lr
        for schedule in schedules:
            schedule.step()
        assert [group["lr"] for group in agvm.param_groups] == [group["lr"] for group in plain.param_groups]
        assert schedules[0].get_last_lr() == schedules[1].get_last_lr()
        assert equal(one, other)


@both_bases
def test_a_loaded_state_is_the_one_that_steps(base: type[Optimizer], tmp_path: Path) -> None:
    """A prototype kept the base's state as a second reference: ``load_state_dict`` rebinds ``self.state``, and the base
    went on with the momentum of the old dict, so that a resumed run was another run.
    """
    whole, resumed = Toy(), Toy(seed=1)
    first = made(base, whole)
    train(whole, first, range(3), FACTORS)
    torch.save((whole.state_dict(), first.state_dict()), tmp_path / "state.pt")
    train(whole, first, range(3, 6), FACTORS)

    second = made(base, resumed)
    train(resumed, second, range(2), FACTORS)  # a momentum of its own, to be forgotten
    weights, state = torch.load(tmp_path / "state.pt")
    resumed.load_state_dict(weights)
    second.load_state_dict(state)
    train(resumed, second, range(3, 6), FACTORS)
    assert equal(whole, resumed)


@both_bases
def test_its_state_dict_is_its_bases(base: type[Optimizer]) -> None:
    one, other = Toy(), Toy()
    agvm, plain = made(base, one), base(param_groups(other), **BASES[base])
    train(one, agvm, range(2))
    train(other, plain, range(2))
    saved, expected = agvm.state_dict(), plain.state_dict()
    assert saved["param_groups"] == expected["param_groups"]
    assert saved["state"].keys() == expected["state"].keys()
    for index, entry in expected["state"].items():
        assert all(
            torch.equal(torch.as_tensor(saved["state"][index][key]), torch.as_tensor(entry[key])) for key in entry
        )
    plain.load_state_dict(copy.deepcopy(saved))


@both_bases
def test_step_hooks_run_once(base: type[Optimizer]) -> None:
    base(param_groups(Toy()), **BASES[base])  # torch wraps a class's step at its first instance
    calls: list[str] = []
    model = Toy()
    optimizer = made(base, model)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, range(2), FACTORS)
    assert calls == ["before", "after"] * 2


def test_zero_grad_and_repr_are_the_bases() -> None:
    model = Toy()
    optimizer = made(torch.optim.SGD, model)
    gradients(model, 0)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "momentum: 0.9" in repr(optimizer)


@pytest.mark.parametrize("key", ["module", "name"])
def test_groups_without_module_or_name_are_refused(key: str) -> None:
    groups = param_groups(Toy())
    del groups[2][key]
    with pytest.raises(ConfigError, match='parameter group 2 has no "module" or "name".*agvm_ds.param_groups'):
        AGVM(groups, lr=0.1)


def test_bare_parameters_are_refused() -> None:
    with pytest.raises(ConfigError, match="parameter group 0 has no"):
        AGVM(Toy().parameters(), lr=0.1)


def test_duplicate_names_are_refused() -> None:
    groups = param_groups(Toy())
    groups[1]["name"] = groups[3]["name"]
    with pytest.raises(ConfigError, match=r"must be unique; given twice: \['rpn_head'\]"):
        AGVM(groups, lr=0.1)


def test_a_module_may_have_several_groups() -> None:
    one, other = Toy(), Toy()
    optimizers = []
    for model, base in ((one, AGVM), (other, torch.optim.SGD)):
        weights = {"params": [model.neck.weight], "module": "heads", "name": "heads#0"}
        biases = {"params": [model.rpn_head[0].bias], "module": "heads", "name": "heads#1", "lr": 0.2}
        factor = 1.0 if base is AGVM else 2.0
        optimizers.append(base([weights | {"lr": 0.1 * factor}, biases | {"lr": 0.2 * factor}], lr=0.1))
    optimizers[0].attached = True  # type: ignore[attr-defined]
    train(one, optimizers[0], range(2), {"heads": 2.0})
    train(other, optimizers[1], range(2))
    assert equal(one, other)


@pytest.mark.parametrize(
    "options", [{"lr": 0.1, "momentun": 0.9}, {"lr": -1.0}, {"lr": 0.1, "nesterov": True}], ids=str
)
def test_arguments_that_the_base_refuses_are_mistakes_in_the_configuration(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.params: "):
        make_optimizer(param_groups(Toy()), torch.optim.SGD, options)


def test_the_public_names() -> None:
    assert agvm_ds.__all__ == ["AGVM", "ConfigError", "attach", "initialize", "param_groups"]
    assert all(callable(getattr(agvm_ds, name)) for name in agvm_ds.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'atach'"):
        agvm_ds.atach  # noqa: B018
