"""Whole runs of launch/train.py and launch/test.py on a little data, over two ranks: what is published, resumed, refused.

A detector that has learned eight images by heart (mAP above 0.4) is where most runs start, so that figures mean something.
"""

from __future__ import annotations

import json
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from agvm_ds.mmdet.testing.saved import read_published
from tests.distributed.learning import AFTER, attempt, by_heart, run
from tests.launch import ON_GPU
from tests.trainer import logged

MASKS = """
model["backbone"]["norm_cfg"] = model["backbone"]["norm_cfg"] | dict(type="BN")
model["backbone"]["norm_cfg"].pop("num_groups")
model["type"] = "MaskRCNN"
model["roi_head"]["mask_roi_extractor"] = dict(
    type="SingleRoIExtractor", roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=1),
    out_channels=32, featmap_strides=[4, 8, 16],
)
model["roi_head"]["mask_head"] = dict(
    type="FCNMaskHead", num_convs=1, in_channels=32, conv_out_channels=16, num_classes=10,
    loss_mask=dict(type="CrossEntropyLoss", use_mask=True, loss_weight=1.0),
)
model["train_cfg"]["rcnn"]["mask_size"] = 14
model["test_cfg"]["rcnn"]["mask_thr_binary"] = 0.5
train_pipeline[1]["with_mask"] = True
train_pipeline[-1]["keys"] = ["img", "gt_bboxes", "gt_labels", "gt_masks"]
evaluation["metric"] = ["bbox", "segm"]
custom_hooks = [dict(type="NumClassCheckHook"), dict(type="SyncNormHook", interval=20)]
"""


def plain_metrics(work: Path) -> dict[str, float]:
    """What plain mmdet, in one process, makes of the latest ``.pth`` and the effective config; on a CPU, beside a GPU too."""
    from mmcv.parallel import MMDataParallel
    from mmdet.apis import init_detector, single_gpu_test
    from mmdet.datasets import build_dataloader, build_dataset

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("torch.nn.parallel.data_parallel"), "_get_available_device_type", lambda: None)
        detector = init_detector(str(work / "config.py"), str(work / "latest.pth"), device="cpu")
        data = build_dataset(detector.cfg.data.val, {"test_mode": True})
        loader = build_dataloader(data, 1, 0, dist=False, shuffle=False)
        results = single_gpu_test(MMDataParallel(detector, device_ids=[-1]), loader)
        found = data.evaluate(results, metric=detector.cfg.evaluation.metric)
    return {key: float(value) for key, value in found.items() if not isinstance(value, str)}


def assert_published_as_logged(work: Path, *metrics: str) -> None:
    """mmdet rounds metrics to three digits, mmcv's log to four. A GPU rounds otherwise than the CPU of ``plain_metrics``."""
    line, plain = logged(work)[-1], plain_metrics(work)
    for metric in metrics:
        assert line[metric] > 0.1
        assert line[metric] == pytest.approx(plain[metric], abs=0.02 if ON_GPU else 1e-3)


PRECISIONS: dict[str, dict[str, Any]] = {
    "zero0": {"zero_optimization": {"stage": 0}},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": {"stage": 3}},
    "zero2_bf16": {"zero_optimization": {"stage": 2}, "bfloat16": {"enabled": True}},
    "zero0_bf16": {"zero_optimization": {"stage": 0}, "bfloat16": {"enabled": True}},
    "zero1_bf16": {"zero_optimization": {"stage": 1}, "bfloat16": {"enabled": True}},
    "zero3_bf16": {"zero_optimization": {"stage": 3}, "bfloat16": {"enabled": True}},
}
MORE = ("zero0_bf16", "zero1_bf16", "zero3_bf16")
PINNED = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
if ON_GPU:
    PRECISIONS |= {f"zero{n}_fp16": {"zero_optimization": {"stage": n}, "fp16": {"enabled": True}} for n in (1, 2, 3)}
    PRECISIONS |= {f"zero{n}_offload": {"zero_optimization": {"stage": n, **PINNED}} for n in (1, 2, 3)}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.extended] if name in MORE else []) for name in PRECISIONS],
)
def continued(request: pytest.FixtureRequest, learned: Path, digits: Path, tmp_path_factory: Any) -> Path:
    """Three updates on other images, from the learned weights; the backbone's first stage is frozen."""
    settings = {"train_batch_size": 16, "agvm": {"precondition": "none", "interval": 2}, **PRECISIONS[request.param]}
    options = {**AFTER, "model.backbone.frozen_stages": 1}
    place = tmp_path_factory.mktemp(request.param)
    return run(place, digits, settings, options, "--load-from", str(learned))


def test_plain_mmdet_measures_what_was_logged(continued: Path) -> None:
    assert_published_as_logged(continued, "bbox_mAP", "bbox_mAP_50")


def test_what_is_frozen_is_published_as_it_was_and_the_rest_is_trained(continued: Path, learned: Path) -> None:
    """In bf16 too, where DeepSpeed rounds the frozen weights that it trains with."""
    before = torch.load(learned, weights_only=True)["state_dict"]
    after = torch.load(continued / "latest.pth", weights_only=True)["state_dict"]
    same = {name for name in before if torch.equal(before[name], after[name])}
    frozen = {name for name in before if name.startswith(("backbone.conv1", "backbone.bn1", "backbone.layer1"))}
    assert frozen and same >= frozen
    trained = [value for name, value in after.items() if name.startswith("rpn_head")]
    assert not any(name.startswith("rpn_head") for name in same)
    assert not all(torch.equal(value, value.bfloat16().float()) for value in trained)  # the fp32 masters


@pytest.mark.extended
def test_what_is_frozen_stays_unrounded_in_a_resumed_run(learned: Path, digits: Path, tmp_path: Path) -> None:
    """Though --load-from is left out: the checkpoint has it."""
    settings = {"train_batch_size": 16, "agvm": {"precondition": "none"}, **PRECISIONS["zero3_bf16"]}
    options = {**AFTER, "model.backbone.frozen_stages": 1}
    run(tmp_path, digits, settings, options, "--load-from", str(learned))
    work = run(tmp_path, digits, settings, {**options, "runner.max_epochs": 2}, "--resume")
    before = torch.load(learned, weights_only=True)["state_dict"]["backbone.conv1.weight"]
    assert not torch.equal(before, before.bfloat16().float())
    for file in ("epoch_1.pth", "epoch_2.pth"):
        assert torch.equal(torch.load(work / file, weights_only=True)["state_dict"]["backbone.conv1.weight"], before)
    assert_equal_weights(
        torch.load(work / "epoch_2.pth", weights_only=True)["state_dict"], read_published(work / "deepspeed").weights
    )


def test_the_deepspeed_checkpoint_has_what_was_published(continued: Path) -> None:
    published = torch.load(continued / "latest.pth", weights_only=True)
    found = read_published(continued / "deepspeed")
    assert_equal_weights(published["state_dict"], found.weights)
    assert {key: published["meta"][key] for key in found.meta} == found.meta


def test_masks_and_batch_norm_under_zero_3(digits: Path, tmp_path: Path) -> None:
    """A rank without detections skips the mask head: on partitioned weights that would be a hang."""
    settings = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": 3},
        "agvm": {"precondition": "none", "interval": 8},
    }
    work = run(tmp_path, digits, settings, {**by_heart(digits), "model.backbone.norm_eval": False}, config=MASKS)
    assert_published_as_logged(work, "bbox_mAP", "segm_mAP_50")
    saved = torch.load(work / "latest.pth", weights_only=True)["state_dict"]
    assert int(saved["backbone.bn1.num_batches_tracked"]) == 48
    assert_equal_weights(saved, read_published(work / "deepspeed").weights)
    modules = json.loads((work / "deepspeed.json").read_text())["agvm"]["modules"]
    assert modules == ["backbone", "neck", "rpn_head", "roi_head.bbox_head", "roi_head.mask_head"]


MANY_HOOKS = """
custom_hooks = [
    dict(type="ExpMomentumEMAHook", momentum=0.2, total_iter=4, priority=49),
    dict(type="CheckInvalidLossHook", interval=1),
]
workflow = [("train", 1), ("val", 1)]
auto_scale_lr = dict(enable=False, base_batch_size=8)
train_pipeline[3]["flip_ratio"] = 0.5
"""
MANY_SETTINGS = {"train_batch_size": 16, "zero_optimization": {"stage": 1}}
MANY_OPTIONS = {
    **AFTER,
    "runner.max_epochs": 2,
    "checkpoint_config.by_epoch": False,
    "checkpoint_config.interval": 2,
    "checkpoint_config.max_keep_ckpts": 2,
    "evaluation.save_best": "bbox_mAP",
    "log_config.interval": 1,
}


@pytest.fixture(scope="module")
def many(learned: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of three updates with much of what a config can ask for, AGVM off."""
    more = ("--diff-seed", "--auto-scale-lr", "--load-from", str(learned))
    return run(tmp_path_factory.mktemp("many"), digits, MANY_SETTINGS, MANY_OPTIONS, *more, config=MANY_HOOKS)


def test_checkpoints_by_update_keep_the_newest(many: Path) -> None:
    assert {path.name for path in many.glob("iter_*.pth")} == {"iter_4.pth", "iter_6.pth"}
    assert {path.name for path in (many / "deepspeed").iterdir() if path.is_dir()} == {"iter_4", "iter_6"}
    assert (many / "latest.pth").resolve().name == "iter_6.pth"


def test_each_epoch_is_evaluated_and_the_best_is_named_after_its_own(many: Path) -> None:
    figures = [line["bbox_mAP"] for line in logged(many) if "bbox_mAP" in line]
    assert len(figures) == 2
    best = figures.index(max(figures)) + 1
    assert [path.name for path in many.glob("best_*.pth")] == [f"best_bbox_mAP_epoch_{best}.pth"]


def test_the_val_phase_sees_every_image(many: Path) -> None:
    """Eight images are one micro-batch of four on each rank: not one update of two, which the training takes."""
    phases = [line for line in logged(many) if "loss_cls" in line]
    assert [line["epoch"] for line in phases] == [1, 2]


def test_the_learning_rate_is_scaled_to_the_global_batch(many: Path) -> None:
    assert {line["lr"] for line in logged(many, "train")} == {2e-4}
    from mmcv import Config

    effective = Config.fromfile(str(many / "config.py"))
    assert (effective.optimizer.lr, effective.auto_scale_lr.enable) == (2e-4, False)


def test_the_averages_are_published_after_an_epoch_and_trained_weights_within_it(many: Path, learned: Path) -> None:
    best = torch.load(next(many.glob("best_*.pth")), weights_only=True)["state_dict"]
    trained = torch.load(many / "iter_6.pth", weights_only=True)["state_dict"]
    assert best.keys() == trained.keys() == torch.load(learned, weights_only=True)["state_dict"].keys()
    assert not torch.equal(best["rpn_head.rpn_cls.weight"], trained["rpn_head.rpn_cls.weight"])
    averages = runner_state(many, "iter_6")["averages"][0]
    figures = [line["bbox_mAP"] for line in logged(many) if "bbox_mAP" in line]
    if figures[1] > figures[0]:  # the best are the last averages
        assert torch.equal(best["rpn_head.rpn_cls.weight"], averages["rpn_head.rpn_cls.weight"])


def runner_state(work: Path, tag: str) -> dict[str, Any]:
    path = work / "deepspeed" / tag / "mp_rank_00_model_states.pt"
    state: dict[str, Any] = torch.load(path, weights_only=False)["runner"]
    return state


def assert_equal_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def resumed_from(work: Path, tag: str, last: str, *words: Any, **more: Any) -> tuple[Any, Any]:
    """(weights, averages) of a run's end, before and after it is resumed from one of its checkpoints."""

    def end() -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
        weights = torch.load(work / f"{last}.pth", weights_only=True)["state_dict"]
        return weights, runner_state(work, last)["averages"]

    before = end()
    (work / "deepspeed" / "latest").write_text(tag)
    (work / f"{last}.pth").unlink()
    run(work.parent, *words, "--resume", **more)
    return before, end()


def test_a_run_resumed_within_an_epoch_is_the_whole_run(many: Path, digits: Path, learned: Path) -> None:
    """With random flips, averages, and a validation phase; AGVM off."""
    more = ("--diff-seed", "--auto-scale-lr", "--load-from", str(learned))
    words = (digits, MANY_SETTINGS, MANY_OPTIONS, *more)
    before, after = resumed_from(many, "iter_4", "iter_6", *words, config=MANY_HOOKS)
    assert_equal_weights(before[0], after[0])
    assert_equal_weights(before[1][0], after[1][0])
    assert [line["iter"] for line in logged(many, "train")] == [2, 3]


@pytest.mark.parametrize(
    ("settings", "config", "said"),
    [
        (
            {**MANY_SETTINGS, "train_batch_size": 8},
            MANY_HOOKS,
            "batches of 16 images, 3 updates an epoch; this run has",
        ),
        (MANY_SETTINGS, 'model["rpn_head"]["feat_channels"] = 16', "parameter rpn_head.rpn_conv.weight: shape ("),
    ],
    ids=["another batch", "another model"],
)
def test_a_resume_that_does_not_fit_is_refused(
    many: Path, digits: Path, settings: dict[str, Any], config: str, said: str
) -> None:
    outcome = attempt(many.parent, digits, settings, MANY_OPTIONS, "--resume", config=config)
    assert outcome.codes == [2, 2], outcome.output
    assert outcome.output.count("error: --resume: ") == 1 and said in outcome.output


ITERATIONS = """
runner = dict(type="IterBasedRunner", max_iters=9)
custom_imports = dict(imports=["tests.own_hooks"])
custom_hooks = [dict(type="StopEarly", updates=5, priority="ABOVE_NORMAL")]
checkpoint_config = dict(interval=2)
evaluation = dict(interval=3, metric="bbox")
lr_config = dict(policy="step", step=[4], warmup="linear", warmup_iters=2)
"""


def test_an_iteration_based_run_saves_evaluates_and_resumes(digits: Path, tmp_path: Path) -> None:
    """The second run is the rest of the first, with no validation: the data, which have no end, go on where they were.

    A hook ends both early, and the last update is evaluated and saved as such.
    With a worker process, whose own random state mmdet begins anew: so with no random transforms.
    """
    settings = {
        "train_batch_size": 16,
        "zero_optimization": {"stage": 0},
        "agvm": {"precondition": "none", "interval": 1},
    }
    options = {"log_config.interval": 1, "data.workers_per_gpu": 1}
    work = run(tmp_path, digits, settings, options, config=ITERATIONS)
    assert {path.name for path in work.glob("iter_*.pth")} == {"iter_2.pth", "iter_4.pth", "iter_5.pth"}
    assert (work / "deepspeed" / "latest").read_text() == "iter_5"
    assert len([line for line in logged(work) if "bbox_mAP" in line]) == 2
    measures = (work / "agvm.jsonl").read_text()
    words = (digits, settings, options, "--no-validate")
    before, after = resumed_from(work, "iter_2", "iter_5", *words, config=ITERATIONS)
    assert_equal_weights(before[0], after[0])
    assert (work / "agvm.jsonl").read_text() == measures
    assert [line["iter"] for line in logged(work, "train")] == [3, 4, 5]
    assert logged(work) == []
