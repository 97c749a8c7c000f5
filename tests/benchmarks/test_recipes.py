"""configs/: the figures of every recipe, unshrunk; and every recipe, shrunk, trains and measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mmcv import Config
from mmdet.models import build_detector

from agvm_ds.config import AGVMConfig, read_block
from agvm_ds.mmdet.configs import read_config
from agvm_ds.mmdet.detector.modules import modules_of
from agvm_ds.mmdet.limits import refuse_unsupported
from agvm_ds.mmdet.plan import make_plan
from agvm_ds.mmdet.planning import scaling
from benchmarks.recipes import recipes
from benchmarks.shrunk import Run, make_data, problem_of, trained

RECIPES = {recipe.name: recipe for recipe in recipes()}
CONFIGS = sorted({recipe.config.stem for recipe in RECIPES.values()})

OFFICIAL = {
    "faster_rcnn_r50_256": (0.16 * 2**0.5, 920, 1020, (820, 1020)),
    "faster_rcnn_r50_512": (0.38, 460, 560, (360, 560)),
    "mask_rcnn_r50_256": (0.16 * 2**0.5, 920, 1020, (820, 1020)),
    "mask_rcnn_r50_512": (0.32, 460, 560, (360, 560)),
}
"""Learning rate, warm-up, AGVM's start and clipping, in updates: those of github.com/Sense-X/AGVM."""

RULES = {"faster_rcnn_r50": (0.02, "linear-sqrt"), "mask_rcnn_r50": (0.02, "linear-sqrt")} | {
    "retinanet_r50": (0.01, "linear-sqrt"),
    "panoptic_fpn_r50": (0.02, "linear-sqrt"),
    "faster_rcnn_r50_adamw": (1e-4, "sqrt"),
    "faster_rcnn_swin_t": (1e-4, "sqrt"),
}
"""Of the others: mmdet's rate at batch 16, and the rule that scales it."""

BOXES, MASKS = ["backbone", "neck", "rpn_head", "roi_head"], ["roi_head.bbox_head", "roi_head.mask_head"]
MODULES = {
    "faster": BOXES,
    "mask": [*BOXES[:3], *MASKS],
    "retinanet": ["backbone", "neck", "bbox_head"],
    "panoptic": [*BOXES[:3], *MASKS, "semantic_head"],
}


def parts(name: str) -> tuple[str, int]:
    """(detector, batch) of a recipe's or a config's name."""
    detector, _, batch = name.partition(".")[0].rpartition("_")
    return detector, int(batch)


def test_every_config_has_its_runs() -> None:
    files = {path.stem for path in next(iter(RECIPES.values())).json_file.parent.glob("*.py")}
    assert set(CONFIGS) == files
    baselines = {f"{name}.baseline" for name in CONFIGS}
    assert set(RECIPES) == baselines | {f"{name}.agvm" for name in CONFIGS if parts(name)[1] > 32}


@pytest.mark.parametrize("name", RECIPES)
def test_batch_rate_and_windows(name: str) -> None:
    recipe, (detector, batch) = RECIPES[name], parts(name)
    settings, cfg = recipe.settings(), read_config(str(recipe.config))
    for gpus in (batch // 16, batch // 32):
        cut = make_plan(settings, cfg, gpus).batch
        assert (cut.train, cut.micro) == (batch, 16) and batch == gpus * 16 * cut.accumulation
    refuse_unsupported(cfg, make_plan(settings, cfg, batch // 16))
    windows = scaling.windows(scaling.COCO_IMAGES, batch)
    rate, warmup, start, clip = OFFICIAL.get(recipe.config.stem) or (
        scaling.scaled_rate(RULES[detector][0], 16, batch, RULES[detector][1]),
        *(windows.warmup, windows.start_step, windows.clip),
    )
    params = settings["optimizer"]["params"]
    assert params["lr"] == pytest.approx(rate, rel=1e-5)
    lr = cfg.lr_config
    assert (lr.policy, lr.warmup, lr.warmup_iters, lr.warmup_ratio) == ("step", "exp", warmup, 0.001)
    if batch == 32:
        assert "agvm" not in settings and settings["gradient_clipping"] == 0
        return
    block = read_block(settings)
    assert block is not None and settings["gradient_clipping"] == 1
    wanted = {"start_step": start, "clip_window": clip, "interval": 5 if batch == 1024 else 10, "ema_decay": 0.97}
    wanted |= {"modulate": name.endswith(".agvm"), "estimator": "split"}
    assert block == AGVMConfig(**wanted)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith(".agvm")])
def test_the_baseline_differs_in_modulation_alone(name: str) -> None:
    agvm, baseline = (RECIPES[name.partition(".")[0] + kind].settings() for kind in (".agvm", ".baseline"))
    assert baseline["agvm"].pop("modulate") is False and agvm["agvm"].pop("modulate") is True
    assert agvm == baseline


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_is_the_recipes(name: str, tmp_path: Path) -> None:
    """Its modules are the paper's; what it changes in mmdet's model is the official code's; plain mmdet reads its dump."""
    path = RECIPES[f"{name}.baseline"].config
    cfg, (detector, _) = read_config(str(path)), parts(name)
    assert modules_of(build_detector(cfg.model)) == MODULES[name.partition("_")[0]]
    sixteen = "rcnn_r50_" in name and "adamw" not in name
    assert (cfg.runner.max_epochs, cfg.lr_config.step) == ((16, [12, 14]) if sixteen else (12, [8, 11]))
    if "swin" not in name:
        backbone = cfg.model.backbone
        assert (backbone.norm_cfg.type, backbone.norm_eval, backbone.frozen_stages) == ("SyncBN", False, 1)
    if detector in ("mask_rcnn_r50", "faster_rcnn_r50", "faster_rcnn_r50_adamw"):
        rpn, roi = cfg.model.rpn_head, cfg.model.roi_head
        assert rpn.loss_cls.use_sigmoid is False
        assert rpn.loss_bbox == dict(type="SmoothL1Loss", beta=1 / 9, loss_weight=1.0)
        assert roi.bbox_head.loss_bbox == dict(type="SmoothL1Loss", beta=1.0, loss_weight=1.0)
        extractor = roi.mask_roi_extractor if detector == "mask_rcnn_r50" else roi.bbox_roi_extractor
        assert extractor.roi_layer.sampling_ratio == 2
        assert (cfg.model.train_cfg.rpn_proposal.max_per_img, cfg.model.test_cfg.rcnn.score_thr) == (2000, 0)
    whole, dump = Config.fromfile(str(path)), tmp_path / "config.py"
    whole.dump(str(dump))
    assert Config.fromfile(str(dump))._cfg_dict == whole._cfg_dict
    assert "import" not in dump.read_text()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("coco"))


IN_CI = "retinanet_r50_512.agvm"
"""The cheapest."""


@pytest.mark.parametrize(
    "name", [IN_CI, *(pytest.param(name, marks=pytest.mark.extended) for name in RECIPES if name != IN_CI)]
)
def test_it_trains_and_measures(name: str, data: Path, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    run = trained(recipe.arguments(tmp_path, data), tmp_path, "agvm" in recipe.settings(), timeout=300)
    assert run.reason == ""
    assert set(run.variances) == (set(MODULES[name.partition("_")[0]]) if "agvm" in recipe.settings() else set())


@pytest.mark.parametrize(
    ("losses", "variances", "said"),
    [
        ([1.0], {"backbone": 0.5}, "1 updates, not 2"),
        ([1.0, float("nan")], {"backbone": 0.5}, "losses"),
        ([1.0, 1.0], {"backbone": 0.5, "neck": None}, "no variance of neck"),
        ([1.0, 1.0], {}, "no variance of any module"),
        ([1.0, 1.0], {"backbone": 0.5}, ""),
    ],
)
def test_what_went_wrong_is_told(losses: list[float], variances: dict[str, Any], said: str) -> None:
    problem = problem_of(Run(losses, variances), True)
    assert problem.startswith(said) and bool(problem) == bool(said)
