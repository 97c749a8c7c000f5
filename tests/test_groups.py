"""Modules of a model: every trainable parameter in exactly one group, whatever chooses the modules."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from agvm_ds.config import ConfigError
from agvm_ds.groups import Group, cut_groups, param_groups
from tests.toy import Toy

CHOICES: list[Any] = [
    None,
    ["backbone"],
    ["backbone", "neck", "rpn_head", "roi_head", "aux_head"],
    ["roi_head", "backbone.0", "backbone", "backbone.2.weight"],
    {"trunk": ["backbone", "neck"], "heads": ["rpn_head", "roi_head.bbox_head", "aux_head"]},
    {"early": ["backbone.0"], "late": ["backbone", "temperature"]},
]


def names_of(model: nn.Module, groups: list[Group]) -> dict[str, list[str]]:
    """Group name -> the names of its parameters."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {group["name"]: [names[id(p)] for p in group["params"]] for group in groups}


def per_parameter(model: nn.Module, **special: dict[str, Any]) -> list[Group]:
    """One group a parameter, as mmcv's ``paramwise_cfg`` makes them: ``special`` is suffix of the name -> settings."""
    groups = []
    for name, parameter in model.named_parameters():
        settings = {"lr": 0.1, "weight_decay": 0.01}
        for suffix, changed in special.items():
            settings |= changed if name.endswith(suffix) else {}
        groups.append({"params": [parameter], **settings})
    return groups


@pytest.mark.parametrize("modules", CHOICES, ids=str)
def test_every_trainable_parameter_is_in_exactly_one_group(modules: Any) -> None:
    model = Toy()
    groups = param_groups(model, modules)
    counts = Counter(id(p) for group in groups for p in group["params"])
    assert counts == {id(p): 1 for p in model.parameters() if p.requires_grad}
    assert len({group["name"] for group in groups}) == len(groups)


def test_by_default_the_modules_are_the_top_level_children() -> None:
    model = Toy()
    groups = param_groups(model)
    assert sorted(group["module"] for group in groups) == [
        "aux_head",
        "backbone",
        "neck",
        "rest",
        "roi_head",
        "rpn_head",
    ]
    assert all(group["module"] == group["name"] for group in groups)
    assert names_of(model, groups)["rest"] == ["temperature"]


def test_the_order_is_that_of_definition() -> None:
    """A module's own parameters come before its children's: ``rest`` is first in the toy."""
    expected = ["rest", "backbone", "neck", "rpn_head", "roi_head", "aux_head"]
    assert [group["name"] for group in param_groups(Toy())] == expected
    shuffled = ["rpn_head", "aux_head", "neck", "roi_head", "backbone"]
    assert [group["name"] for group in param_groups(Toy(), shuffled)] == expected


def test_the_longest_prefix_wins() -> None:
    model = Toy()
    groups = names_of(model, param_groups(model, ["backbone", "backbone.2", "backbone.2.bias"]))
    assert groups["backbone"] == ["backbone.0.weight", "backbone.0.bias"]
    assert groups["backbone.2"] == ["backbone.2.weight"]
    assert groups["backbone.2.bias"] == ["backbone.2.bias"]
    assert len(groups["rest"]) == 10


def test_a_prefix_ends_at_a_dot() -> None:
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "head2": nn.Linear(2, 2)})
    groups = names_of(model, param_groups(model, ["head"]))
    assert groups == {"head": ["head.weight", "head.bias"], "rest": ["head2.weight", "head2.bias"]}


def test_a_dict_joins_prefixes() -> None:
    model = Toy()
    groups = names_of(model, param_groups(model, {"trunk": ["neck", "backbone.2"], "scale": ["temperature"]}))
    assert groups["trunk"] == ["backbone.2.weight", "backbone.2.bias", "neck.weight"]
    assert groups["scale"] == ["temperature"]
    assert set(groups) == {"scale", "trunk", "rest"}


def test_parameters_without_elements_are_left_out() -> None:
    """As DeepSpeed leaves them out of its buffers."""
    model = Toy()
    model.neck.register_parameter("nothing", nn.Parameter(torch.zeros(0)))
    assert names_of(model, param_groups(model))["neck"] == ["neck.weight"]


def test_frozen_parameters_and_modules_are_left_out() -> None:
    model = Toy()
    model.neck.requires_grad_(False)
    model.backbone[0].requires_grad_(False)
    groups = names_of(model, param_groups(model, ["backbone", "neck", "frozen", "rpn_head"]))
    assert set(groups) == {"backbone", "rpn_head", "rest"}
    assert groups["backbone"] == ["backbone.2.weight", "backbone.2.bias"]


def test_options_are_in_every_group() -> None:
    groups = param_groups(Toy(), ["backbone"], lr=0.3, weight_decay=0.1)
    assert all((group["lr"], group["weight_decay"]) == (0.3, 0.1) for group in groups)


def test_tied_weights_belong_to_the_module_that_is_defined_first() -> None:
    model = nn.Module()
    model.embed, model.body, model.head = nn.Linear(3, 3, bias=False), nn.Linear(3, 3), nn.Linear(3, 3)
    model.head.weight = model.embed.weight
    expected = {"embed": ["embed.weight"], "body": ["body.weight", "body.bias"], "head": ["head.bias"]}
    assert names_of(model, param_groups(model)) == expected
    assert names_of(model, param_groups(model, ["head", "body", "embed"])) == expected


def test_an_entry_that_covers_nothing_is_refused_with_near_names() -> None:
    with pytest.raises(ConfigError) as caught:
        param_groups(Toy(), ["bakcbone", "neck", "roi_head.bbox", "zzz"])
    lines = str(caught.value).splitlines()
    assert lines[0] == "modules: bakcbone: covers no parameter of the model; did you mean backbone?"
    assert lines[1].strip() == "roi_head.bbox: covers no parameter of the model; did you mean roi_head.bbox_head?"
    assert lines[2].strip() == "zzz: covers no parameter of the model"
    assert lines[3].strip().startswith("the model has: temperature, backbone, ")


def test_an_entry_inside_a_dict_that_covers_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="neckk: covers no parameter of the model; did you mean neck"):
        param_groups(Toy(), {"trunk": ["backbone", "neckk"]})


def test_a_prefix_in_two_modules_is_refused() -> None:
    with pytest.raises(ConfigError, match="the prefix neck is in both trunk and heads"):
        param_groups(Toy(), {"trunk": ["backbone", "neck"], "heads": ["neck", "rpn_head"]})


def test_equal_settings_of_a_module_are_merged() -> None:
    model = Toy()
    groups = cut_groups(per_parameter(model), model)
    assert names_of(model, groups) == names_of(model, param_groups(model))
    assert all((group["lr"], group["weight_decay"]) == (0.1, 0.01) for group in groups)


def test_different_settings_of_a_module_are_groups_with_names_of_their_own() -> None:
    model = Toy()
    special = {"bias": {"lr": 0.2, "weight_decay": 0.0}, "2.weight": {"lr": 0.05}}
    groups = cut_groups(per_parameter(model, **special), model, ["backbone", "neck", "rpn_head"])
    assert names_of(model, groups) == {
        "rest#0": ["temperature", "roi_head.bbox_head.weight", "aux_head.weight"],
        "rest#1": ["roi_head.bbox_head.bias", "aux_head.bias"],
        "backbone#0": ["backbone.0.weight"],
        "backbone#1": ["backbone.0.bias", "backbone.2.bias"],
        "backbone#2": ["backbone.2.weight"],
        "neck": ["neck.weight"],
        "rpn_head#0": ["rpn_head.0.weight"],
        "rpn_head#1": ["rpn_head.0.bias", "rpn_head.2.bias"],
        "rpn_head#2": ["rpn_head.2.weight"],
    }
    rates = {group["name"]: (group["module"], group["lr"], group["weight_decay"]) for group in groups}
    assert rates["backbone#1"] == ("backbone", 0.2, 0.0)
    assert rates["backbone#2"] == ("backbone", 0.05, 0.01)
    assert rates["neck"] == ("neck", 0.1, 0.01)


def test_cutting_again_gives_the_same() -> None:
    model = Toy()
    groups = cut_groups(per_parameter(model, bias={"lr": 0.2}), model)
    again = cut_groups(groups, model)
    assert names_of(model, again) == names_of(model, groups)


def test_only_what_is_given_is_cut() -> None:
    model = Toy()
    groups = cut_groups([{"params": model.neck.parameters(), "lr": 0.1}], model)
    assert names_of(model, groups) == {"neck": ["neck.weight"]}


def test_a_parameter_of_another_model_is_refused() -> None:
    stranger = nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(ConfigError, match=r"a parameter of shape \(2, 3\) in the groups is not in the model"):
        cut_groups([{"params": [stranger]}], Toy())
