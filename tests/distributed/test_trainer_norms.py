"""What a config's backbone asks for, frozen_stages, norm_eval, init_cfg and SyncBN, means in a run what it means in mmdet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmcv import Config
from mmcv.runner import build_optimizer
from mmdet.datasets import build_dataloader, build_dataset
from mmdet.models import build_detector

from agvm_ds.demo.data import ensure
from agvm_ds.mmdet.configs import read_config
from agvm_ds.mmdet.detector.model import to_device
from agvm_ds.mmdet.optimizer import build
from agvm_ds.mmdet.plan import make_plan
from tests.distributed.learning import BY_HEART, attempt
from tests.trainer import cfg_options, data_options, launch, logged, write_config, write_json

Weights = dict[str, torch.Tensor]
NORMS = 'model["backbone"].update(norm_cfg=dict(type="{type}"), norm_eval={norm_eval}, frozen_stages={frozen}'
SETTINGS: dict[str, Any] = {"train_batch_size": 8, "zero_optimization": {"stage": 2}, "agvm": {"start_step": 0}}
OPTIONS = {"runner.max_epochs": 1, "lr_config.warmup": None, "log_config.interval": 1, "evaluation.interval": 1}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure(tmp_path_factory.mktemp("data") / "digits", train=8, val=4)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone's weights, as a file for init_cfg; statistics of BN among them that no initialisation would give."""
    cfg = Config.fromfile(str(write_config(tmp_path_factory.mktemp("config"), backbone("BN", False))))
    state = build_detector(cfg.model).backbone.state_dict()
    torch.manual_seed(1)
    weights = {name: value + 0.01 * torch.rand(value.shape) for name, value in state.items() if "tracked" not in name}
    torch.save({"state_dict": weights}, file := tmp_path_factory.mktemp("weights") / "backbone.pth")
    return file


def backbone(kind: str, norm_eval: bool, frozen: int = -1, file: Path | None = None) -> str:
    """Lines of Python for a config."""
    init = f', init_cfg=dict(type="Pretrained", checkpoint={str(file)!r})' if file else ""
    return NORMS.format(type=kind, norm_eval=norm_eval, frozen=frozen) + init + ")"


def train(place: Path, digits: Path, lines: str, *more: str) -> tuple[Weights, str]:
    """(the weights after one update on two ranks, the output)."""
    words = [str(write_config(place, lines)), "--deepspeed_config", str(write_json(place, SETTINGS)), "--seed", "0"]
    words += ["--work-dir", str(place / "work"), *more, *cfg_options({**data_options(digits), **OPTIONS})]
    outcome = launch("train.py", words, place)
    assert outcome.good, outcome.output
    return torch.load(place / "work/epoch_1.pth", weights_only=True)["state_dict"], outcome.output


def updated_by_mmdet(config: Path, digits: Path) -> Weights:
    """The same one update by mmdet and mmcv alone, in this process."""
    cfg = Config.fromfile(str(config))
    cfg.merge_from_dict({key: str(value) for key, value in data_options(digits).items()})
    detector = build_detector(cfg.model)
    detector.init_weights()
    optimizer = build_optimizer(detector, cfg.optimizer)
    batch = next(iter(build_dataloader(build_dataset(cfg.data.train), 4, 0, dist=False)))
    detector.train()
    detector.train_step(to_device(batch, "cpu"), optimizer)["loss"].backward()
    optimizer.step()
    return dict(detector.state_dict())


def changed(weights: Weights, file: Path) -> set[str]:
    """The backbone's entries that are no longer those of the file."""
    before = torch.load(file, weights_only=True)["state_dict"]
    return {name for name, value in before.items() if not torch.equal(value, weights[f"backbone.{name}"])}


@pytest.mark.parametrize("norm_eval", [False, pytest.param(True, marks=pytest.mark.extended)])
def test_an_update_changes_what_it_changes_in_mmdet(
    norm_eval: bool, digits: Path, pretrained: Path, tmp_path: Path
) -> None:
    """Frozen stages keep the pretrained weights and statistics; with norm_eval all statistics keep theirs."""
    weights, _ = train(tmp_path, digits, backbone("BN", norm_eval, 1, pretrained))
    found = changed(weights, pretrained)
    assert found == changed(updated_by_mmdet(tmp_path / "digits_config.py", digits), pretrained)
    assert "layer2.0.conv1.weight" in found and not any(name.startswith(("conv1", "bn1", "layer1")) for name in found)
    assert ("layer2.0.bn1.running_mean" in found) != norm_eval


def test_groups_have_what_mmdet_trains(pretrained: Path, tmp_path: Path) -> None:
    decay = 'optimizer["paramwise_cfg"] = dict(norm_decay_mult=0.0, custom_keys={"neck": dict(lr_mult=0.1)})'
    path = write_config(tmp_path, f"{backbone('BN', False, 1, pretrained)}\n{decay}")
    cfg = read_config(str(path))
    detector = build_detector(cfg.model)
    names = {id(parameter): name for name, parameter in detector.named_parameters()}

    def by_name(groups: Any) -> dict[str, tuple[float, float]]:
        return {
            names[id(p)]: (group["lr"], group["weight_decay"])
            for group in groups
            for p in group["params"]
            if p.requires_grad
        }

    setup = build(detector, cfg, make_plan({"agvm": {}}, cfg, 2))
    assert by_name(setup.groups) == by_name(build_optimizer(detector, cfg.optimizer).param_groups)
    held = {group["module"]: [names[id(p)] for p in group["params"]] for group in setup.groups}
    assert all(name.startswith(module) for module, inside in held.items() for name in inside)
    assert not any(name.startswith(("backbone.bn1", "backbone.layer1")) for name in by_name(setup.groups))


def test_sync_bn_trains_as_bn_when_asked(digits: Path, tmp_path: Path) -> None:
    synced, said = train(tmp_path / "sync", digits, backbone("SyncBN", False), "--revert-sync-bn")
    plain, _ = train(tmp_path / "plain", digits, backbone("BN", False))
    assert synced.keys() == plain.keys() and all(torch.equal(synced[name], plain[name]) for name in plain)
    assert "SyncBN" in (tmp_path / "sync/work/config.py").read_text() and "--revert-sync-bn" in said


@pytest.mark.parametrize("kind", ["SyncBN", pytest.param("MMSyncBN", marks=pytest.mark.extended)])
def test_sync_bn_is_evaluated_as_it_is(kind: str, digits: Path, tmp_path: Path) -> None:
    """The metrics of the SyncBN config while training, on the images that it has learned, and by launch/test.py again."""
    learned = {"ann_file": digits / "annotations/train.json", "img_prefix": digits / "train"}
    measured = {f"data.{split}.{key}": value for split in ("val", "test") for key, value in learned.items()}
    options = {**BY_HEART, **measured}
    trained = attempt(tmp_path, digits, SETTINGS, options, "--revert-sync-bn", config=backbone(kind, False))
    work = tmp_path / "work"
    assert trained.good, trained.output
    assert kind in (work / "config.py").read_text() and "--revert-sync-bn" in trained.output
    words = [str(tmp_path / "digits_config.py"), str(work / "latest.pth"), "--json", str(tmp_path / "m.json")]
    outcome = launch("test.py", [*words, *cfg_options({**data_options(digits), **measured})], tmp_path)
    assert outcome.good, outcome.output
    found = json.loads((tmp_path / "m.json").read_text())["metric"]["bbox_mAP"]
    assert found > 0.1 and found == pytest.approx(logged(work)[-1]["bbox_mAP"], abs=1e-3)
