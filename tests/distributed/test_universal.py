"""DeepSpeed's universal checkpoints, for loops of one's own: AGVM's state and each group's settings come back with them."""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from deepspeed.checkpoint.ds_to_universal import main as convert

from tests.engines import Record, ds_config, identical, record, started, train
from tests.launch import run_ranks
from tests.toy import Toy

SAVED, ALL = 4, 8
STAGES = (1, 2, 3)
BLOCK = {"interval": 2, "start_step": 1, "ema_decay": 0.9}
UNIVERSAL = {"checkpoint": {"load_universal": True}}
INFO = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
"""What DeepSpeed's converter wants to find in the client_state."""


def other_model() -> Toy:
    """Other weights; but for the frozen ones, which DeepSpeed's universal checkpoints leave as they are."""
    model = Toy(seed=1)
    model.frozen.load_state_dict(Toy().frozen.state_dict())
    return model


def settle(engine: Any) -> None:
    """Each group has a rate and a decay of its own."""
    for index, group in enumerate(engine.basic_optimizer.param_groups):
        group["lr"] *= 1 + index / 10
        group["weight_decay"] *= 1 + index / 5


def before(place: Path) -> dict[int, list[Record]]:
    """In a rank: train, save, and train on."""
    found = {}
    for stage in STAGES:
        with started(ds_config(stage, 2, "AdamW", BLOCK), Toy()) as engine:
            settle(engine)
            records = train(engine, range(SAVED))
            engine.save_checkpoint(place, tag=f"stage{stage}", client_state={**INFO, "epoch": 7})
            found[stage] = records + train(engine, range(SAVED, ALL))
    return found


def after(place: Path, accumulation: int) -> dict[int, Any]:
    """In a rank: load the universal checkpoint, and train on."""
    found = {}
    for stage in STAGES:
        with started(ds_config(stage, accumulation, "AdamW", BLOCK, **UNIVERSAL), other_model()) as engine:
            _, client_state = engine.load_checkpoint(place, tag=f"stage{stage}_universal")
            settings = [(group["lr"], group["weight_decay"]) for group in engine.basic_optimizer.param_groups]
            found[stage] = record(engine), settings, client_state["epoch"], train(engine, range(SAVED, ALL))
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, list[Record]], dict[int, dict[int, Any]]]:
    """Before: two ranks; after, by number of ranks: two and one."""
    place = tmp_path_factory.mktemp("universal")
    first = run_ranks(before, 2, place, place)[0]
    for stage in STAGES:
        folders = {
            "input_folder": str(place / f"stage{stage}"),
            "output_folder": str(place / f"stage{stage}_universal"),
        }
        options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
        with contextlib.redirect_stdout(io.StringIO()):
            convert(Namespace(**folders, **options, inject_missing_state=False))
    return first, {ranks: run_ranks(after, ranks, place, place, 4 // ranks)[0] for ranks in (2, 1)}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [2, 1])
def test_agvm_goes_on_from_a_universal_checkpoint(ranks: int, stage: int, runs: Any) -> None:
    whole, loaded = runs[0][stage], runs[1][ranks][stage]
    seen, settings, epoch, rest = loaded
    saved = whole[SAVED - 1]
    assert identical(seen.parameters, saved.parameters)
    for name in ("scale_factors", "variances", "noise_scales", "rates", "steps", "measured"):
        assert identical(getattr(seen, name), getattr(saved, name)), f"{name} loaded are not those saved"
    assert len({lr for lr, _ in settings}) == len({decay for _, decay in settings}) == 6, "each group's own"
    assert epoch == 7
    for mine, theirs in zip(rest, whole[SAVED:], strict=True):
        assert mine.steps == theirs.steps and mine.measured == theirs.measured
        assert max(abs(mu - theirs.scale_factors[name]) for name, mu in mine.scale_factors.items()) < 1e-5
        off = {name: (p - theirs.parameters[name]).abs().max().item() for name, p in mine.parameters.items()}
        assert max(off.values()) < 2e-6, off
