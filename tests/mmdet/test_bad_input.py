"""What a user can give wrongly to launch/train.py: each is told in one message before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mmcv import Config

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.configs import DEMO_CONFIG, config_path, read_config
from agvm_ds.mmdet.data import check_categories, check_files
from agvm_ds.mmdet.errors import HostError
from agvm_ds.mmdet.plan import make_plan, settle_batch
from agvm_ds.mmdet.train import TrainOptions, prepare, splits_read

AGVM = {"precondition": "none"}


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "ds.json").write_text(json.dumps({"train_batch_size": 16, "agvm": AGVM}))
    return {"deepspeed_config": str(tmp_path / "ds.json"), "work_dir": str(tmp_path / "work")}


def test_good_input_is_accepted(options: dict[str, Any]) -> None:
    plan, cfg, _ = prepare(TrainOptions(**options))
    assert (plan.batch.micro, plan.batch.accumulation, plan.batch.ranks) == (4, 4, 1)
    assert plan.deepspeed["gradient_clipping"] == cfg.optimizer_config.grad_clip.max_norm


def test_config_not_found_names_near_ones(options: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"config not found: faster_rcnn_r50_fpn_1x_coko .*faster_rcnn_r50_fpn_1x_coco"
    ):
        prepare(TrainOptions(**options, config="faster_rcnn_r50_fpn_1x_coko"))


def test_shipped_configs_are_found_with_and_without_their_folder() -> None:
    whole = config_path("faster_rcnn/faster_rcnn_r50_fpn_1x_coco")
    assert whole == config_path("faster_rcnn_r50_fpn_1x_coco")
    assert whole.is_file()


def test_nothing_to_resume(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="nothing to resume"):
        prepare(TrainOptions(**options, resume=True))


def test_missing_deepspeed_config(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="DeepSpeed config not found: nowhere.json"):
        prepare(TrainOptions(**{**options, "deepspeed_config": "nowhere.json"}))


def test_work_dir_that_cannot_be_made(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--work-dir .* cannot be written"):
        prepare(TrainOptions(**{**options, "work_dir": str(tmp_path / "file" / "below")}))


def test_missing_data_is_listed_together() -> None:
    cfg = read_config(None, {"data.train.ann_file": "no/train.json", "data.val.img_prefix": "no/val"})
    with pytest.raises(ConfigError) as caught:
        check_files(cfg, ["train", "val"])
    assert "data.train.ann_file: not found: no/train.json" in str(caught.value)
    assert "data.val.img_prefix: not found: no/val" in str(caught.value)


def test_only_what_a_run_reads_must_be_there(tmp_path: Path) -> None:
    """A user with no test split trains all the same, and tests without the training split."""
    (tmp_path / "here").mkdir()
    cfg = read_config(None)
    for split in ("train", "val"):
        cfg.data[split].update(ann_file=str(tmp_path / "here"), img_prefix=str(tmp_path / "here"))
    cfg.data.test.ann_file = "no/test.json"
    check_files(cfg, ["train", "val"])
    with pytest.raises(HostError, match="data.test.ann_file: not found: no/test.json"):
        check_files(cfg, ["test"])
    options = TrainOptions(deepspeed_config="", validate=False)
    assert splits_read(options, cfg) == ["train"]
    cfg.workflow = [("train", 1), ("val", 1)]
    assert splits_read(options, cfg) == ["train", "val"]


class Annotated:
    """As much of a CocoDataset as its check reads."""

    CLASSES = ("cat",)
    ann_file = "a.json"

    def __init__(self, category: int) -> None:
        self.coco = self
        self.cats = {1: {"name": "cat"}, 2: {"name": "dog"}}
        self.anns = {7: {"id": 7, "category_id": category}}


def test_a_category_outside_the_classes_is_refused_unless_asked_for() -> None:
    check_categories(Annotated(1), allow_others=False)
    with pytest.raises(ConfigError, match=r"annotation 7 .*'dog'.*--allow-other-categories"):
        check_categories(Annotated(2), allow_others=False)
    check_categories(Annotated(2), allow_others=True)
    with pytest.raises(ConfigError, match="does not list"):
        check_categories(Annotated(3), allow_others=True)


@pytest.mark.parametrize(
    ("config", "ranks", "said"),
    [
        ({"train_batch_size": 16}, 3, r"16 does not divide .* 4 images x 3 ranks = 12"),
        ({"train_batch_size": 16, "gradient_accumulation_steps": 3}, 2, "batch sizes disagree"),
        ({"train_batch_size": "16"}, 2, "must be an integer"),
        ({"train_batch_size": 0}, 2, "must be an integer"),
    ],
)
def test_batch_arithmetic_that_does_not_divide(config: dict[str, Any], ranks: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settle_batch(config, 4, ranks)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"train_batch_size": 4, "agvm": AGVM}, "needs at least 2"),
        ({"train_batch_size": 16, "fp16": {"enabled": True}}, "needs a GPU"),
        (
            {"train_batch_size": 16, "agvm": {"intervall": 3, "start_step": -1}},
            r"2 mistakes:\n.*agvm\.start_step(.|\n)*",
        ),
    ],
)
def test_plans_that_cannot_be(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_plan(config, read_config(None), ranks=1)


def test_clipping_is_off_unless_someone_asks() -> None:
    """DeepSpeed 0.19 clips to 1 when its key is absent; an mmdet config without grad_clip means no clipping."""
    cfg = read_config(None)
    cfg.optimizer_config = {}
    assert make_plan({"train_batch_size": 16}, cfg, 1).deepspeed["gradient_clipping"] == 0.0
    assert make_plan({"train_batch_size": 16, "gradient_clipping": 3.0}, cfg, 1).deepspeed["gradient_clipping"] == 3.0


def test_demo_config_is_an_ordinary_mmdet_config() -> None:
    assert isinstance(read_config(str(DEMO_CONFIG)), Config)
