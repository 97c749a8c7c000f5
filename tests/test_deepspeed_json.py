"""Reading a DeepSpeed configuration: the list of its keys is DeepSpeed's own, and a user's own keys are let through."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

import agvm_ds
from agvm_ds.config import ConfigError
from agvm_ds.deepspeed_json import BLOCKS, VALUES, load_config, unknown_keys
from tests.launch import run_ranks

READ_ELSEWHERE = {"sequence_parallel_size", "data_parallel_size"}
"""Keys that deepspeed.initialize reads beside its DeepSpeedConfig."""


class Heard(dict):  # type: ignore[type-arg]
    """A configuration that keeps which keys were asked for."""

    asked: ClassVar[set[str]] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self) -> Any:
        return HeardKeys(self)

    def __copy__(self) -> Heard:
        return Heard(self)


class HeardKeys:
    def __init__(self, owner: Heard) -> None:
        self.owner = owner

    def __contains__(self, key: object) -> bool:
        return key in self.owner

    def __iter__(self) -> Iterator[str]:
        return dict.__iter__(self.owner)


def test_the_known_keys_are_those_that_deepspeed_reads() -> None:
    DeepSpeedConfig(Heard(train_batch_size=1))
    assert Heard.asked - {"vocabulary_size"} <= {*BLOCKS, *VALUES}
    assert {*BLOCKS, *VALUES} - READ_ELSEWHERE <= Heard.asked


def test_keys_of_the_users_own_are_let_through() -> None:
    config = {"train_batch_size": 4, "comment": "x", "_fp16": {}, "#agvm": {}, "team": "vision", "agvm": {}}
    assert load_config(config) == config
    assert unknown_keys(config) == ["comment", "_fp16", "#agvm", "team"]


def test_hjson_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "ds.hjson"
    path.write_text("\ufeff{\n  # a comment\n  train_batch_size: 4\n  fp16: {enabled: false},\n}\n")
    assert load_config(path) == {"train_batch_size": 4, "fp16": {"enabled": False}}


def test_the_autotuners_base64_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    """It is longer than a file's name may be."""
    config = {"train_batch_size": 4, "agvm": {"modules": [f"layer{index}" for index in range(200)]}}
    for text in (json.dumps(config), json.dumps({**config, "team": "??>>~~"})):
        encoded = base64.urlsafe_b64encode(text.encode()).decode()
        assert load_config(encoded) == json.loads(text)
    with pytest.raises(ConfigError, match="DeepSpeed config not found: abcd"):
        load_config("abcd")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"agmv": {"interval": 1}}, "did you mean agvm"),
        ({"zero_optimization": True}, "old form"),
        ({"zero_optimization": {"stage": 9}}, "stage = 9"),
        ({"scheduler": {"type": "Nope"}}, "scheduler.type = 'Nope': not known; DeepSpeed has LRRangeTest"),
    ],
)
def test_initialize_refuses_them_before_anything_is_built(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        agvm_ds.initialize(model=torch.nn.Linear(2, 2), config={"train_batch_size": 4, **config})


def test_initialize_tells_of_keys_that_nobody_reads(tmp_path: Path) -> None:
    assert run_ranks(_warnings, 1, tmp_path) == [
        ["the DeepSpeed config has keys that neither DeepSpeed nor AGVM reads: team, _fp16"]
    ]


def _warnings() -> list[str]:
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("agvm_ds").addHandler(handler)
    sgd = {"type": "SGD", "params": {"lr": 0.1}}
    config = {"train_batch_size": 4, "optimizer": sgd, "team": "vision", "_fp16": {"enabled": True}}
    model = torch.nn.Linear(2, 2)
    agvm_ds.initialize(model=model, model_parameters=model.parameters(), config=config)
    return heard
