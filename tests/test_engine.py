"""What initialize and attach refuse before DeepSpeed starts, or of an engine that somebody else has started."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import agvm_ds
from agvm_ds.config import AGVMConfig, ConfigError
from agvm_ds.support import refuse_unsupported
from tests.engines import ds_config
from tests.toy import Toy

CONFIG = ds_config(2, 2)
WITHOUT_OPTIMIZER = {key: value for key, value in CONFIG.items() if key != "optimizer"}
ARGS = SimpleNamespace(deepspeed_config="ds.json")

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"config": CONFIG}, "initialize: needs a model"),
    "no config": ({"model": Toy()}, "give the DeepSpeed config once"),
    "two configs": ({"model": Toy(), "config": CONFIG, "args": ARGS}, "give the DeepSpeed config once"),
    "no base": ({"model": Toy(), "config": WITHOUT_OPTIMIZER}, 'has no "optimizer" block, and none was passed'),
    "no base in config_params": ({"model": Toy(), "config_params": WITHOUT_OPTIMIZER}, 'has no "optimizer" block'),
    "another optimizer": (
        {"model": Toy(), "config": CONFIG, "optimizer": torch.optim.SGD(Toy().parameters(), lr=0.1)},
        r"the optimizer is SGD: pass agvm_ds.AGVM\(groups, base=...\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_initialize_is_given_wrongly_is_told_before_anything_starts(name: str) -> None:
    given, said = WRONG[name]
    with pytest.raises(ConfigError, match=said):
        agvm_ds.initialize(**given)
    assert not torch.distributed.is_initialized()


def test_attach_wants_an_agvm_optimizer() -> None:
    optimizer = torch.optim.SGD(Toy().parameters(), lr=0.1)
    engine = SimpleNamespace(basic_optimizer=optimizer, _config=SimpleNamespace(_param_dict={"agvm": {}}))
    with pytest.raises(ConfigError, match="the engine's client optimizer is SGD; it must be an agvm_ds.AGVM"):
        agvm_ds.attach(engine)


def engine_like(model: torch.nn.Module, **other: Any) -> Any:
    """As much of an engine as is looked at, of two ranks."""
    return SimpleNamespace(
        **{"module": model, "_config": SimpleNamespace(_param_dict={}), "dp_world_size": 2}
        | {"pipeline_parallelism": False, "sequence_parallel_size": 1, "mp_world_size": 1, "has_moe_layers": False}
        | {name: (lambda: 1) for name in ("gradient_accumulation_steps", "gradient_predivide_factor")}
        | {
            "zero_optimization_stage": lambda: 2,
            "postscale_gradients": lambda: True,
            "zero_reduce_scatter": lambda: True,
        }
        | other
    )


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"pipeline_parallelism": True}, "pipeline, sequence or tensor parallelism"),
        ({"sequence_parallel_size": 2}, "pipeline, sequence or tensor parallelism"),
        ({"mp_world_size": 2}, "pipeline, sequence or tensor parallelism"),
        ({"has_moe_layers": True}, "mixture-of-experts layers"),
        ({"dp_world_size": 1}, "an update has n = 1 micro-batch"),
    ],
    ids=str,
)
def test_an_engine_that_cannot_be_measured_is_refused(other: dict[str, Any], said: str) -> None:
    model = Toy()
    optimizer = agvm_ds.AGVM(agvm_ds.param_groups(model), lr=0.1)
    refuse_unsupported(engine_like(model), AGVMConfig(), optimizer)
    with pytest.raises(ConfigError, match=said):
        refuse_unsupported(engine_like(model, **other), AGVMConfig(), optimizer)
