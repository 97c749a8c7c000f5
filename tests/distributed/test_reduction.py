"""Where AGVM has nothing to do it must be its base under plain ``deepspeed.initialize``, bit for bit."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch

import agvm_ds
from agvm_ds import AGVM, param_groups
from tests import options
from tests.engines import AGVM_BLOCK, ROWS, ds_config, masters, parameters, update
from tests.launch import run_ranks
from tests.reference import Reference
from tests.toy import Toy

RANKS, ACCUMULATION, UPDATES = 2, 2, 4
STAGES = range(4)
BASES = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}
OTHERS = ("Adam", "Adagrad", "Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop")
EVERY_UPDATE = AGVM_BLOCK | {"interval": 1, "start_step": 0}
ONE_MODULE = {"all": ["backbone", "neck", "rpn_head", "roi_head", "aux_head", "temperature"]}


@dataclass(frozen=True)
class Setting:
    """What is common to a run and to its baseline."""

    stage: int
    base: str = "SGD"
    bf16: bool = False
    estimator: str = "pairwise"

    def __str__(self) -> str:
        kind = "" if self.estimator == "pairwise" else f" {self.estimator}"
        return f"stage{self.stage} {self.base}{' bf16' if self.bf16 else ''}{kind}"

    @property
    def optimizer(self) -> type[torch.optim.Optimizer]:
        """The base."""
        return options.BASES[self.base].reference

    @property
    def arguments(self) -> dict[str, Any]:
        """Its arguments."""
        return dict(options.BASES[self.base].params)

    def config(self, agvm: dict[str, Any] | None) -> dict[str, Any]:
        """Clips every update: the norm must be the baseline's, too."""
        more: dict[str, Any] = {"zero_allow_untested_optimizer": True, "gradient_clipping": 0.3}
        more |= {"bf16": {"enabled": True}} if self.bf16 else {}
        how = {"estimator": self.estimator, "precondition": "auto"}
        config = ds_config(self.stage, ACCUMULATION, agvm=None if agvm is None else agvm | how, **more)
        base = options.BASES[self.base]
        return config | {"optimizer": {"type": base.name, "params": {**base.params, **base.json_only}}}


SETTINGS = [
    *(Setting(stage, base, estimator=how) for base in BASES for how in ("pairwise", "split") for stage in STAGES),
    *(Setting(stage, bf16=True) for stage in STAGES),
    *(Setting(stage, base) for base in OTHERS for stage in STAGES),
]


def grouped(setting: Setting, model: Toy, modules: Any = None) -> torch.optim.Optimizer:
    """The base itself, over the same parameter groups as AGVM's: the order of reductions and norms is theirs."""
    return setting.optimizer(param_groups(model, modules), **setting.arguments)


def wrapped(setting: Setting, model: Toy) -> AGVM:
    return AGVM(param_groups(model), base=setting.optimizer, **setting.arguments)


def plain(setting: Setting, model: Toy) -> Any:
    return deepspeed.initialize(model=model, optimizer=grouped(setting, model), config=setting.config(None))[0]


def plain_one_group(setting: Setting, model: Toy) -> Any:
    groups = grouped(setting, model, ONE_MODULE)
    return deepspeed.initialize(model=model, optimizer=groups, config=setting.config(None))[0]


def plain_json(setting: Setting, model: Toy) -> Any:
    trained = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=setting.config(None))[0]


def bounds_of_one(setting: Setting, model: Toy) -> Any:
    return agvm_ds.initialize(model=model, config=setting.config(EVERY_UPDATE | {"ratio_bounds": [1, 1]}))[0]


def watched(setting: Setting, model: Toy) -> Any:
    return agvm_ds.initialize(model=model, config=setting.config(EVERY_UPDATE | {"modulate": False}))[0]


def modulated(setting: Setting, model: Toy) -> Any:
    return agvm_ds.initialize(model=model, config=setting.config(EVERY_UPDATE))[0]


def modulated_by_args(setting: Setting, model: Toy) -> Any:
    """As in DeepSpeed's examples: the configuration is a file that the command line names."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(setting.config(EVERY_UPDATE), file)
        file.flush()
        return agvm_ds.initialize(args=SimpleNamespace(deepspeed_config=file.name), model=model)[0]


def modulated_by_hand(setting: Setting, model: Toy) -> Any:
    return by_hand(setting, model, EVERY_UPDATE)


def bounds_of_one_by_hand(setting: Setting, model: Toy) -> Any:
    return by_hand(setting, model, EVERY_UPDATE | {"ratio_bounds": [1, 1]})


def by_hand(setting: Setting, model: Toy, block: dict[str, Any]) -> Any:
    config = setting.config(block)
    engine = deepspeed.initialize(model=model, optimizer=wrapped(setting, model), config=config)[0]
    agvm_ds.attach(engine)
    agvm_ds.attach(engine)  # a second call does nothing
    return engine


def before_start(setting: Setting, model: Toy) -> Any:
    return agvm_ds.initialize(model=model, config=setting.config(AGVM_BLOCK | {"start_step": UPDATES}))[0]


def one_module(setting: Setting, model: Toy) -> Any:
    block = EVERY_UPDATE | {"modules": ONE_MODULE, "anchor": "all"}
    return agvm_ds.initialize(model=model, config=setting.config(block))[0]


def off(setting: Setting, model: Toy) -> Any:
    config = setting.config({"enabled": False})
    return agvm_ds.initialize(model=model, optimizer=wrapped(setting, model), config=config)[0]


def no_block(setting: Setting, model: Toy) -> Any:
    engine = deepspeed.initialize(model=model, optimizer=wrapped(setting, model), config=setting.config(None))[0]
    agvm_ds.attach(engine)
    return engine


def off_json(setting: Setting, model: Toy) -> Any:
    trained = [p for p in model.parameters() if p.requires_grad]
    return agvm_ds.initialize(model=model, model_parameters=trained, config=setting.config({"enabled": False}))[0]


def no_block_json(setting: Setting, model: Toy) -> Any:
    trained = [p for p in model.parameters() if p.requires_grad]
    return agvm_ds.initialize(model=model, model_parameters=trained, config=setting.config(None))[0]


Start = Callable[[Setting, Toy], Any]

REDUCED: dict[Start, Start] = {
    bounds_of_one: plain,
    watched: plain,
    bounds_of_one_by_hand: plain,
    modulated_by_hand: modulated,
    modulated_by_args: modulated,
    before_start: plain,
    one_module: plain_one_group,
    off: plain,
    no_block: plain,
    off_json: plain_json,
    no_block_json: plain_json,
}
"""How a run is started that has nothing to modulate, or whose pieces are put together by hand -> its baseline."""

LESS = [bounds_of_one, watched, one_module, off]
"""What is tried with AdamW, with split and in bf16; the paths of the others are the same."""


def starts(setting: Setting) -> list[Start]:
    if setting.base in OTHERS:  # under ZeRO, plain DeepSpeed's Adagrad knows one group only
        return [one_module] if setting.base == "Adagrad" else [bounds_of_one, one_module]
    return list(REDUCED) if setting.base == "SGD" and not setting.bf16 and setting.estimator == "pairwise" else LESS


@dataclass
class Outcome:
    """What a run came to."""

    losses: list[float]
    parameters: dict[str, torch.Tensor]
    masters: dict[str, torch.Tensor]
    measured: int | None
    scale_factors: dict[str, float]


def outcome(start: Start, setting: Setting) -> Outcome:
    """In a rank: train from the start."""
    engine = start(setting, Toy())
    losses = [loss for t in range(UPDATES) for loss in update(engine, t)]
    agvm = getattr(engine, "agvm", None)
    factors = dict(agvm.scale_factors) if agvm else {}
    found = Outcome(losses, parameters(engine), masters(engine), agvm.measured if agvm else None, factors)
    engine.destroy()
    return found


def outcomes() -> dict[tuple[str, str], Outcome]:
    """In a rank: (setting, start) -> what came of it."""
    wanted = {
        (setting, start): None for setting in SETTINGS for run in starts(setting) for start in (run, REDUCED[run])
    }
    return {(str(setting), start.__name__): outcome(start, setting) for setting, start in wanted}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Outcome]]:
    """By rank."""
    return run_ranks(outcomes, RANKS, tmp_path_factory.mktemp("reduction"))


CASES = [(setting, start) for setting in SETTINGS for start in starts(setting)]


@pytest.mark.parametrize(("setting", "start"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_it_is_the_plain_optimizer(setting: Setting, start: Start, runs: list[dict[tuple[str, str], Outcome]]) -> None:
    for by_start in runs:
        found = by_start[str(setting), start.__name__]
        baseline = by_start[str(setting), REDUCED[start].__name__]
        assert found.losses == baseline.losses
        for name, value in baseline.parameters.items():
            assert torch.equal(found.parameters[name], value), name
            assert torch.equal(found.masters[name], baseline.masters[name]), name


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_and_it_did_measure(setting: Setting, runs: list[dict[tuple[str, str], Outcome]]) -> None:
    """The bounds and the single module are what makes the factors 1, not a measure that never took place."""
    every = (bounds_of_one, watched, bounds_of_one_by_hand, modulated_by_hand, modulated_by_args, one_module)
    expected = dict.fromkeys(every, UPDATES) | {before_start: 0}
    for start in starts(setting):
        assert runs[0][str(setting), start.__name__].measured == expected.get(start)


@pytest.mark.parametrize("stage", STAGES)
def test_what_only_watches_shows_the_factors_that_it_does_not_apply(stage: int, runs: list[Any]) -> None:
    setting = Setting(stage)
    settings = {"interval": 1, "start": 0, "max_norm": 0.3, "options": setting.arguments}
    reference = Reference(ranks=RANKS, accumulation=ACCUMULATION, rows=ROWS, modulate=False, **settings)
    for t in range(UPDATES):
        reference.update(t)
    found = runs[0][str(setting), "watched"].scale_factors
    modulated_ones = runs[0][str(setting), "modulated"].scale_factors
    apart = {name: abs(modulated_ones[name] - mu) for name, mu in reference.mu.items()}
    assert max(apart.values()) > 2e-5, "those of a run that applies them are others"
    assert max(abs(found[name] - mu) for name, mu in reference.mu.items()) < 1e-6


def test_the_runs_are_not_all_the_same(runs: list[dict[tuple[str, str], Outcome]]) -> None:
    """What is compared depends on stage and base where it may, and training has moved the weights."""
    one, other = (runs[0][str(Setting(0, base)), "plain"].parameters for base in BASES)
    start = dict(Toy().named_parameters())
    for name in ("backbone.0.weight", "temperature", "roi_head.bbox_head.bias"):
        assert not torch.equal(one[name], other[name])
        assert not torch.equal(one[name], start[name])
