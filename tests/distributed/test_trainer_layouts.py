"""--resume in a run of another layout: ranks, ZeRO stage, modules, estimator, AGVM on or off, optimizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from agvm_ds.demo.data import ensure
from tests.trainer import Outcome, cfg_options, data_options, launch, write_config, write_json

AGVM = {"interval": 2, "ema_decay": 0.5, "start_step": 1}
SETTINGS: dict[str, Any] = {"train_batch_size": 8, "zero_optimization": {"stage": 2}, "agvm": AGVM}
OPTIONS = {
    "runner.max_epochs": 2,
    "lr_config.warmup_iters": 8,
    "log_config.interval": 1,
    "evaluation.interval": 2,
    "data.samples_per_gpu": 2,
}
RATE = 6e-3
"""The demo config's."""
AVERAGES = 'custom_hooks.append(dict(type="EMAHook", momentum=0.1, warm_up=1, priority=49))\n'
"""What is published are averages: the end of a run tells whether they went on."""
EPOCH, MEASURES = 6, [2, 4, 6, 8, 10]


class Runs:
    """A run with AGVM and one without, each with the checkpoint of its first epoch."""

    def __init__(self, place: Path) -> None:
        self.place, self.digits = place, ensure(place / "digits", train=48, val=8)
        self.begun = {on: place / f"begun_{on}" for on in (True, False)}
        for on, work in self.begun.items():
            settings = SETTINGS | {"agvm": {**AGVM, "enabled": on}}
            outcome = self.go(work, settings)
            assert outcome.good, outcome.output

    def go(self, work: Path, settings: dict[str, Any], *more: str, ranks: int = 2, change: str = "") -> Outcome:
        place = work.parent / f"{work.name}_in"
        named = [str(write_config(place, AVERAGES + change)), "--deepspeed_config", str(write_json(place, settings))]
        words = [*named, "--work-dir", str(work), "--seed", "0", *more]
        return launch("train.py", [*words, *cfg_options({**data_options(self.digits), **OPTIONS})], place, ranks)

    def resume(self, name: str, settings: dict[str, Any], on: bool = True, **more: Any) -> tuple[Path, str]:
        """Go on from epoch 1 with other settings; (work dir, what was said)."""
        work = self.place / name.replace(" ", "_")
        shutil.copytree(self.begun[on], work, symlinks=True)
        (work / "deepspeed/latest").write_text("epoch_1")
        (work / "epoch_2.pth").unlink()
        outcome = self.go(work, SETTINGS | settings, "--resume", **more)
        assert outcome.good, outcome.output
        assert f"at update {EPOCH}," in outcome.output
        assert (work / "epoch_2.pth").exists()
        return work, outcome.output


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("layouts"))


def end(work: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(work / "epoch_2.pth", weights_only=True)["state_dict"])


def lines(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "agvm.jsonl").read_text().splitlines()]


def test_another_stage_goes_on_as_the_same_one_would(runs: Runs) -> None:
    """With as many ranks even the data come in the same order: the ends agree but for rounding."""
    work, said = runs.resume("stage 3", {"zero_optimization": {"stage": 3}})
    assert "resuming in another layout: ZeRO stage 2 -> 3" in said
    assert not any(words in said for words in ("not kept", "the optimizer goes on with", "had other settings"))
    one, other = end(runs.begun[True]), end(work)
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-3
    last, there = lines(work)[-1]["modules"], lines(runs.begun[True])[-1]["modules"]
    assert all(abs(last[name]["scale_factor"] - there[name]["scale_factor"]) < 1e-3 for name in there)


def test_other_ranks_keep_moments_scale_factors_and_the_rate(runs: Runs) -> None:
    """The run's own rate is another by now, and is told to be of no effect, as in mmcv and DeepSpeed; a loss has one."""
    change = f'optimizer = dict(type="AdamW", lr={RATE / 4}, betas=(0.9, 0.99), weight_decay=0.5)\n'
    change += 'model["rpn_head"]["loss_cls"]["loss_weight"] = 2.0'
    work, said = runs.resume("4 ranks", {"zero_optimization": {"stage": 1}}, ranks=4, change=change)
    assert "resuming in another layout: ranks 2 -> 4; ZeRO stage 2 -> 1" in said
    assert "resumed on 4 ranks from 2: data order and random state are not continued" in said
    assert "not kept" not in said
    assert [line["update"] for line in lines(work)] == MEASURES
    assert lines(work)[:2] == lines(runs.begun[True])[:2], "measured before the checkpoint"
    kept = f"goes on with the checkpoint's settings (this run's): lr = {RATE} ({RATE / 4}), weight_decay = 0.05 (0.5)"
    assert kept in said
    others = said.split("the run so far had other settings (are all its --cfg-options there?):\n")[1]
    assert others.splitlines()[0].strip() == "model.rpn_head.loss_cls.loss_weight: 1.0 before, 2.0 now"
    assert lines(work)[-1]["modules"]["neck"]["lr"] == lines(runs.begun[True])[-1]["modules"]["neck"]["lr"]


def test_other_modules_keep_what_has_the_same_name(runs: Runs) -> None:
    block = {**AGVM, "modules": ["backbone", "neck"], "estimator": "split"}
    work, said = runs.resume("modules", {"agvm": block})
    assert "modules that the checkpoint does not have start with a scale factor of 1: rest" in said
    assert "modules of the checkpoint that this run does not have are left out: rpn_head, roi_head" in said
    assert "scale factors so far come from estimator pairwise; from here on split" in said
    before, first = lines(runs.begun[True])[1]["modules"], lines(work)[2]["modules"]
    expected = 0.5 * before["neck"]["scale_factor"] + 0.5 * first["neck"]["ratio"]
    assert first["neck"]["scale_factor"] == pytest.approx(expected, abs=1e-12)
    assert first["rest"]["scale_factor"] == pytest.approx(0.5 + 0.5 * first["rest"]["ratio"], abs=1e-12)


def test_agvm_newly_on(runs: Runs) -> None:
    work, said = runs.resume("on", {}, on=False)
    assert "not kept: no scale factors to keep: they start at 1" in said
    assert [line["update"] for line in lines(work)] == MEASURES[2:]


def test_agvm_newly_off_is_the_baseline_from_there_on(runs: Runs) -> None:
    work, said = runs.resume("off", {"agvm": {"enabled": False}})
    assert "not kept: scale factors: AGVM is off in this run" in said
    assert said.count("not kept") == 1
    assert lines(work) == lines(runs.begun[True])[:2], "none of the run that went on with it"
    watched, _ = runs.resume("watched", {"agvm": {**AGVM, "modulate": False}})
    one, other, modulated = end(work), end(watched), end(runs.begun[True])
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-5, (
        "groups are cut otherwise: rounding"
    )
    assert max((one[name] - modulated[name]).abs().max().item() for name in one) > 1e-3


def test_another_optimizer_keeps_weights_and_scale_factors(runs: Runs) -> None:
    change = 'optimizer = dict(type="SGD", lr=1e-3, momentum=0.9)'
    work, said = runs.resume("SGD", {}, change=change)
    assert "resuming in another layout: optimizer AdamW -> SGD" in said
    assert "not kept: the optimizer's state: that of AdamW is not SGD's" in said
    before, first = lines(runs.begun[True])[1]["modules"]["neck"], lines(work)[2]["modules"]["neck"]
    assert first["scale_factor"] == pytest.approx(0.5 * before["scale_factor"] + 0.5 * first["ratio"], abs=1e-12)
    there = lines(runs.begun[True])[2]["modules"]["neck"]
    assert first["lr"] / 1e-3 == pytest.approx(there["lr"] / RATE), "this run's rate, at the same place of the schedule"
