"""What mmdet configs ask for beside the plain case: wrapped data sets, sizes, schedules, hooks of the user's own, YOLOX."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mmcv import Config
from mmdet.datasets import build_dataset

from agvm_ds.checkpoints import Vault
from agvm_ds.demo.data import ensure
from agvm_ds.mmdet.configs import config_path
from tests.trainer import Outcome, launch, logged, write_config, write_json

FEATURES = """
custom_imports = dict(imports=["tests.own_hooks"])
custom_hooks = [dict(type="NumClassCheckHook"), dict(type="Seen"), dict(type="Published"), {hook}]
weights_alone = dict(type="CheckpointHook", interval=1, save_optimizer=False, create_symlink=False)
custom_hooks.append(dict(weights_alone, filename_tmpl="weights_{{}}.pth"))

train_pipeline[2] = dict(type="Resize", img_scale=[(64, 64), (96, 96)], multiscale_mode="range", keep_ratio=True)
half = dict(data["train"], ann_file={digits!r} + "/annotations/train.json", img_prefix={digits!r} + "/train/")
rare = dict(type="ClassBalancedDataset", oversample_thr=0.9, dataset=half)
data["train"] = dict(type="RepeatDataset", times=1, dataset=dict(type="ConcatDataset", datasets=[half, rare]))
val = dict(data["val"], ann_file={digits!r} + "/annotations/val.json", img_prefix={digits!r} + "/val/")
unseen = dict(val, ann_file={digits!r} + "/annotations/train.json", img_prefix={digits!r} + "/train/")
data["val"] = data["test"] = [val, unseen]
load_from = {learned!r}
data["samples_per_gpu"] = 2

evaluation = dict(interval=3, dynamic_intervals=[(2, 1)], metric="bbox", save_best="auto")
lr_config = dict(policy="CosineAnnealing", by_epoch=False, min_lr=1e-4, warmup="exp", warmup_iters=5, warmup_ratio=0.1)
momentum_config = dict(policy="CosineAnnealing", by_epoch=False, min_momentum=0.5)
optimizer = dict(type="SGD", lr=0.002, momentum=0.9)
runner = dict(type="EpochBasedRunner", max_epochs=4)
log_config["interval"] = 1
"""
SETTINGS = {
    "train_batch_size": 16,
    "zero_optimization": {"stage": 2},
    "agvm": {"start_step": 2, "interval": 2, "precondition": "none"},
}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of ``digits``: the same images to validate."""
    return ensure(tmp_path_factory.mktemp("data") / "digits", train=24, val=8)


def attempt(place: Path, config: Path, *more: str, settings: dict[str, Any] = SETTINGS) -> Outcome:
    named = [str(config), "--deepspeed_config", str(write_json(place, settings)), "--work-dir", str(place / "work")]
    return launch("train.py", [*named, "--seed", "0", "--diff-seed", *more], place)


class Run:
    """Broken off in its second epoch by a hook, resumed, and ended by another after the third of four epochs."""

    def __init__(self, place: Path, digits: Path, learned: Path) -> None:
        self.work, self.digits, self.learned, self.place = place / "work", digits, learned, place
        self.broken = attempt(place, self.config('dict(type="Break", epoch=1)'))
        self.left = {path.name for path in self.work.iterdir()}
        vault = Vault(self.work / "deepspeed")
        self.latest = vault.latest()
        manifest = vault.manifest(self.latest or "")
        self.damage = (
            [file.problem(vault.folder / str(self.latest)) for file in manifest.files] if manifest else ["none"]
        )
        self.stopped = attempt(place, self.config('dict(type="StopEarly", epochs=3)'), "--resume")
        assert self.stopped.good, self.stopped.output

    def config(self, hook: str) -> Path:
        return write_config(self.place, FEATURES.format(digits=str(self.digits), learned=str(self.learned), hook=hook))

    def seen(self, rank: int) -> list[dict[str, Any]]:
        return seen(self.work, rank)


def seen(work: Path, rank: int) -> list[dict[str, Any]]:
    """What a rank trained on, an entry an update."""
    return [json.loads(line) for line in (work / f"seen_{rank}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, few: Path, learned: Path) -> Run:
    return Run(tmp_path_factory.mktemp("features"), few, learned)


def test_a_hook_that_raises_ends_every_rank_and_leaves_whole_files(run: Run) -> None:
    assert all(run.broken.codes) and "RuntimeError: the cable is out" in run.broken.output
    assert (run.latest, set(run.damage)) == ("epoch_1", {None})
    assert {"epoch_1.pth", "latest.pth"} <= run.left and not [name for name in run.left if name.endswith(".tmp")]


def test_a_hook_ends_a_run_early_with_everything_in_place(run: Run) -> None:
    names = {path.name for path in run.work.iterdir()}
    assert "epoch_3.pth" in names and "epoch_4.pth" not in names
    assert (run.work / "latest.pth").resolve().name == "epoch_3.pth"
    assert (run.work / "deepspeed/latest").read_text() == "epoch_3"
    assert "wall time" in run.stopped.output


def test_a_checkpoint_without_optimizer_is_a_pth_alone(run: Run) -> None:
    assert {f"weights_{epoch}.pth" for epoch in (1, 2, 3)} <= {path.name for path in run.work.iterdir()}
    assert (run.work / "deepspeed/epoch_3").is_dir() and not list((run.work / "deepspeed").glob("weights_*"))


def test_dynamic_intervals_and_each_of_several_validation_sets(run: Run) -> None:
    lines = [line for line in logged(run.work) if "0_bbox_mAP" in line]
    assert [line["epoch"] for line in lines] == [2, 3]
    seen, unseen = ([line[f"{index}_bbox_mAP"] for line in lines] for index in (0, 1))
    assert all(one > 0.1 and one > other for one, other in zip(seen, unseen, strict=True)), (seen, unseen)
    assert "bbox_mAP" not in lines[0]
    figures = [line["0_bbox_mAP"] for line in lines]
    best = [2, 3][figures.index(max(figures))]
    assert [path.name for path in run.work.glob("best_*")] == [f"best_0_bbox_mAP_epoch_{best}.pth"]


def test_wrapped_data_sets_are_read_in_full(run: Run) -> None:
    cfg = Config.fromfile(str(run.work / "config.py"))
    images = len(build_dataset(cfg.data.train))
    assert images > 2 * 24, "the rare classes' images come more than once"
    epoch = math.ceil(images / 4) // 4
    assert [line["iter"] for line in run.seen(0) if line["epoch"] == 2] == list(range(2 * epoch, 3 * epoch))


def test_ranks_train_on_images_of_different_sizes(run: Run) -> None:
    pairs = [(one["shapes"], other["shapes"]) for one, other in zip(run.seen(0), run.seen(1), strict=True)]
    assert any(one != other for one, other in pairs)
    assert {max(size) for one, _ in pairs for size in one} <= {64, 80, 96}


def test_the_schedule_counts_updates(run: Run) -> None:
    """Cosine with an exponential warm-up, as mmcv's hook would set it for as many iterations as there are updates."""
    lines = [line for line in run.seen(0) if line["epoch"] != 1] + [line for line in run.seen(0) if line["epoch"] == 1]
    epoch = len([line for line in lines if line["epoch"] == 0])
    for line in lines:
        done = line["iter"] / (4 * epoch)
        rate = 1e-4 + 0.5 * (0.002 - 1e-4) * (1 + math.cos(math.pi * done))
        warm = 0.1 ** (1 - line["iter"] / 5) if line["iter"] < 5 else 1.0
        assert line["lr"] == pytest.approx(rate * warm, rel=1e-6)
        assert line["momentum"] == pytest.approx(0.5 + 0.5 * (0.9 - 0.5) * (1 + math.cos(math.pi * done)), rel=1e-6)


def small_yolox(place: Path, digits: Path) -> Path:
    """The YOLOX-s that mmdet ships, with its hooks and schedule, made small: three epochs, the last without mosaics."""
    cfg = Config.fromfile(str(config_path("yolox_s_8x8_300e_coco")))
    cfg.model.update(input_size=(64, 64), random_size_range=(1, 3), random_size_interval=1)
    cfg.model.backbone.widen_factor = 0.125
    cfg.model.neck.update(in_channels=[32, 64, 128], out_channels=32)
    cfg.model.bbox_head.update(num_classes=10, in_channels=32, feat_channels=32)
    classes = tuple("0123456789")
    for split, folder in (("train", "train"), ("val", "val"), ("test", "val")):
        node = cfg.data[split].get("dataset", cfg.data[split])
        node.update(ann_file=f"{digits}/annotations/{folder}.json", img_prefix=f"{digits}/{folder}/", classes=classes)
    mosaic, affine, mix, *_ = cfg.data.train.pipeline
    for step in (mosaic, mix, *(step for step in cfg.data.train.pipeline if step.type == "Resize")):
        step.img_scale = (64, 64)
    affine.border = (-32, -32)
    cfg.data.val.pipeline[1].img_scale = cfg.data.test.pipeline[1].img_scale = (64, 64)
    cfg.data.update(samples_per_gpu=2, workers_per_gpu=0, persistent_workers=False)
    cfg.runner.max_epochs, cfg.lr_config.num_last_epochs, cfg.lr_config.warmup_iters = 3, 1, 1
    switch, sync, average = cfg.custom_hooks
    switch.num_last_epochs = sync.num_last_epochs = 1
    average.update(momentum=0.2, total_iter=4)
    cfg.custom_hooks.append({"type": "Seen"})
    cfg.custom_imports = {"imports": ["tests.own_hooks"]}
    cfg.evaluation.update(interval=2, dynamic_intervals=[(2, 1)])
    cfg.checkpoint_config.interval = cfg.log_config.interval = 1
    path = place / "small_yolox.py"
    cfg.dump(str(path))
    return path


@pytest.fixture(scope="module")
def yolox(tmp_path_factory: pytest.TempPathFactory, few: Path) -> Path:
    """The work dir of a run under ZeRO-3."""
    place = tmp_path_factory.mktemp("yolox")
    settings = {**SETTINGS, "train_batch_size": 8, "zero_optimization": {"stage": 3}}
    outcome = attempt(place, small_yolox(place, few), settings=settings)
    assert outcome.good, outcome.output
    return place / "work"


def test_yolox_ranks_agree_on_every_size(yolox: Path) -> None:
    sizes = [[line["size"] for line in seen(yolox, rank)] for rank in (0, 1)]
    assert sizes[0] == sizes[1] and len(set(map(tuple, sizes[0]))) > 1


def test_yolox_publishes_its_averages_under_zero_3(yolox: Path) -> None:
    published = torch.load(yolox / "epoch_3.pth", weights_only=True)["state_dict"]
    state = torch.load(yolox / "deepspeed/epoch_3/zero_pp_rank_0_mp_rank_00_model_states.pt", weights_only=False)
    averages = state["runner"]["averages"][0]
    assert averages.keys() == published.keys()
    assert all(torch.equal(value, published[name]) for name, value in averages.items())
    other = torch.load(yolox / "deepspeed/epoch_3/zero_pp_rank_1_mp_rank_00_model_states.pt", weights_only=False)
    assert other["runner"]["averages"] == [{}], "once is enough"


def test_yolox_is_evaluated_at_its_own_intervals(yolox: Path) -> None:
    assert [line["epoch"] for line in logged(yolox) if "bbox_mAP" in line] == [2, 3]
    assert len(list(yolox.glob("best_bbox_mAP_epoch_*.pth"))) == 1
