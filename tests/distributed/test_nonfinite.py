"""Bad numbers in whole launches of two ranks: what is skipped changes nothing, what stops the run names who had them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from agvm_ds.demo.data import ensure
from tests.engines import identical
from tests.faults.table import NOTHING, survived
from tests.trainer import Outcome, cfg_options, data_options, launch, write_config, write_json

RANKS, ACCUMULATION, LIMIT = 2, 2, 2
FAULTS = [
    (1, 1, 1, "gradient"),
    (2, 0, 0, "constant"),
    (4, 0, 1, "once"),
    (6, 1, 0, "loss"),
    (7, 1, 0, "drawn"),
    (8, 0, 1, "loss"),
]
"""(update, rank, micro-batch, kind): three updates an epoch, and the third in a row ends the third epoch."""

CONFIG = """
custom_imports = dict(imports=["tests.faults.numbers"])
custom_hooks.append(dict(type="FaultHook", faults={faults}, place="{place}"))
{norm}
max_nonfinite_updates = {limit}
checkpoint_config["max_keep_ckpts"] = -1
"""
BATCH_NORM = 'model["backbone"]["norm_cfg"] = dict(type="BN", requires_grad=True)'
"""Its statistics must survive too."""
OPTIONS = {"lr_config": "None", "runner.max_epochs": 4, "log_config.interval": 1, "optimizer.lr": 1e-3}
AGVM = {"agvm": {"precondition": "none", "interval": 1, "ema_decay": 0.5}}
BF16 = {"bf16": {"enabled": True}}
SETTINGS: dict[str, dict[str, Any]] = {
    "zero0": {"zero_optimization": {"stage": 0}, **AGVM},
    "zero0 bf16": {"zero_optimization": {"stage": 0}, **AGVM, **BF16},
    "zero1 without norm": {"zero_optimization": {"stage": 1, "compute_grad_norm": False}, "gradient_clipping": 0.0},
    "zero2": {"zero_optimization": {"stage": 2}, **AGVM},
    "zero2 bf16 unchecked": {
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True, "check_grad_overflow": False},
    },
    "zero3": {"zero_optimization": {"stage": 3}, **AGVM},
    "zero3 bf16": {"zero_optimization": {"stage": 3}, **BF16},
}


@dataclass(frozen=True)
class Run:
    """A launch that has ended."""

    settings: dict[str, Any]
    place: Path
    outcome: Outcome

    def records(self, rank: int = 0) -> dict[int, dict[str, Any]]:
        """update -> its state "before" and "after"."""
        records = torch.load(self.place / f"records_{rank}.pt", weights_only=False)
        return {record["update"]: record for record in records}

    def line(self, update: int) -> str:
        """What was said of an update."""
        return self.outcome.output.split(f"update {update}: a ")[1].split("nothing of this update")[0]


def started(place: Path, digits: Path, settings: dict[str, Any], faults: list[Any], limit: int, *more: str) -> Run:
    change = CONFIG.format(faults=faults, place=place, limit=limit, norm=BATCH_NORM)
    named = [str(write_config(place, change)), "--work-dir", str(place / "work"), "--seed", "0", "--no-validate", *more]
    named += ["--deepspeed_config", str(write_json(place, {"train_batch_size": 16, **settings}))]
    outcome = launch("train.py", [*named, *cfg_options({**data_options(digits), **OPTIONS})], place)
    return Run(settings, place, outcome)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure(tmp_path_factory.mktemp("data") / "digits", train=48, val=8)


@pytest.fixture(scope="module", params=SETTINGS)
def skipping(request: pytest.FixtureRequest, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    return started(place, digits, SETTINGS[request.param], FAULTS, LIMIT)


def trained(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Without BatchNorm's statistics, which a forward changes: of no effect when the run ends there."""
    return {
        name: value for name, value in state["weights"].items() if ".running_" not in name and "tracked" not in name
    }


def test_a_bad_update_changes_nothing_but_counters(skipping: Run) -> None:
    """Weights, BatchNorm's statistics, momenta and scale factors, bit for bit; the last one ends the run."""
    for rank in range(RANKS):
        records = skipping.records(rank)
        assert list(records) == list(range(9)), skipping.outcome.output
        bad = {update for update, *_ in FAULTS}
        for update, record in records.items():
            before, after = record["before"], record["after"]
            weights = trained if update == 8 else lambda state: state["weights"]
            assert identical(weights(before), weights(after)) is (update in bad), update
            assert identical(before["momenta"], after["momenta"]) is (update in bad), update
            assert all(torch.isfinite(value).all() for value in after["weights"].values())
            assert identical(after["random"], record["random"]), "as the update itself has left it"
            if before["agvm"]:
                keys = ("scale_factors", "variances", "measured")
                assert all(identical(before["agvm"][key], after["agvm"][key]) for key in keys) is (update in bad)


def test_counters_advance_as_for_any_skipped_update(skipping: Run) -> None:
    records = skipping.records()
    skipped = 0
    for update in range(8):
        skipped += any(update == bad for bad, *_ in FAULTS)
        assert records[update]["after"]["counters"] == (update + 1, skipped, 16 * (update + 1))
        if records[update]["after"]["agvm"]:
            assert records[update]["after"]["agvm"]["steps"] == update + 1


def test_each_is_told_once_and_one_more_in_a_row_ends_the_run(skipping: Run) -> None:
    outcome = skipping.outcome
    assert outcome.codes == [2, 2], outcome.output
    assert "Traceback" not in outcome.output
    assert [outcome.output.count(f"update {update}: a ") for update, *_ in FAULTS] == [1] * 6
    assert outcome.output.count("error: ") == 1
    assert outcome.output.count("error: update 8: a loss is not finite") == 1
    assert [outcome.output.count(f"skipped: {k} of 2 in a row") for k in (1, 2)] == [3, 2]


def test_who_and_what_is_named(skipping: Run) -> None:
    gradient, constant, once, loss, drawn = (skipping.line(update) for update in (1, 2, 4, 6, 7))
    assert "rank 1, micro-batch 0; gradients of neck" in drawn, "the same random numbers again"
    assert gradient.startswith("gradient, or its squared norm, is not finite\n  rank 1, micro")
    assert "rank 1, micro-batch 1; gradients of neck: neck.lateral_convs.0.conv." in gradient
    assert "gradients of backbone: backbone." in gradient
    assert "rank 0" not in gradient and "micro-batch 0" not in gradient
    assert "rpn_head" not in gradient and "roi_head" not in gradient
    assert gradient.count(".png (id ") == 4
    assert "loss is not finite\n  rank 0, micro-batch 0; loss_cls = inf; images " in constant
    assert "loss is not finite\n  rank 1, micro-batch 0; loss_cls = nan; images " in loss
    assert constant.count(".png (id ") == loss.count(".png (id ") == 4
    assert "the fault comes and goes" in once
    assert once.count(".png (id ") == 16, "all images of the update"
    for rank in range(RANKS):
        for index in range(ACCUMULATION):
            assert f"rank {rank}, micro-batch {index}; images " in once


def test_nothing_is_saved_after_the_end(skipping: Run) -> None:
    work = skipping.place / "work"
    assert {path.name for path in work.glob("*.pth")} == {"epoch_1.pth", "epoch_2.pth", "latest.pth"}
    assert (work / "deepspeed/latest").read_text() == "epoch_2"


@pytest.mark.parametrize("skipping", ["zero0", "zero3"], indirect=True)
def test_a_run_that_skipped_can_be_resumed(skipping: Run, digits: Path) -> None:
    """From the end of an epoch whose last update was skipped: the rest is the same bit for bit, random states too."""
    whole = skipping.records()
    (skipping.place / "work/deepspeed/latest").write_text("epoch_1")
    again = started(skipping.place, digits, skipping.settings, FAULTS, LIMIT, "--resume")
    resumed = again.records()
    assert list(resumed) == list(range(3, 9)), again.outcome.output
    assert all(identical(resumed[update], whole[update]) for update in range(3, 9))
    stage = skipping.settings["zero_optimization"]["stage"]
    survived(f"nan and inf, allowed, ZeRO-{stage}", "told, skipped, nothing applied; --resume bit for bit", NOTHING)


STOPS: dict[str, tuple[dict[str, Any], str, str]] = {
    "gradient": (
        {"zero_optimization": {"stage": 2}, **AGVM},
        "gradient",
        "gradients of neck: neck.lateral_convs.0.conv.",
    ),
    "loss": ({"zero_optimization": {"stage": 0}}, "loss", "loss_cls = nan"),
    "huge": ({"zero_optimization": {"stage": 0}, **AGVM}, "huge", "gradients of neck: neck.lateral_convs.0.conv."),
}


@pytest.mark.parametrize("name", STOPS)
def test_by_default_the_first_one_ends_the_run(name: str, digits: Path, tmp_path: Path) -> None:
    settings, kind, said = STOPS[name]
    run = started(tmp_path, digits, settings, [(1, 1, 0, kind)], 0)
    assert run.outcome.codes == [2, 2], run.outcome.output
    assert run.outcome.output.count("error: update 1: ") == run.outcome.output.count("update 1: a ") == 1
    assert run.outcome.output.count("AGVM: update 1: ") == int("agvm" in settings), "not again when it is taken again"
    assert f"rank 1, micro-batch 0; {said}" in run.outcome.output
    assert "max_nonfinite_updates in the mmdet config, now 0" in run.outcome.output
    assert "Traceback" not in run.outcome.output
    assert not list((tmp_path / "work").glob("*.pth"))
    for rank in range(RANKS):
        last = run.records(rank)[1]
        assert identical(last["before"]["momenta"], last["after"]["momenta"])
        assert identical(trained(last["before"]), trained(last["after"]))
    survived(f"nan or inf, {name}", "told with rank, micro-batch, modules, images; nothing applied", NOTHING)
