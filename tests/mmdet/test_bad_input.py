"""What a user can give wrongly to launch/train.py, in one table: each is told in one message before ranks meet or train.

A row goes through the whole command line in this process, up to where ranks would build a model; launches of several ranks
are in tests/distributed/test_trainer_bad_input.py.
"""

from __future__ import annotations

import gc
import json
import runpy
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import agvm_ds.mmdet.train
from agvm_ds.config import ConfigError
from agvm_ds.mmdet.checks.data_check import check_on_hosts
from agvm_ds.mmdet.configs import config_path, read_config
from agvm_ds.mmdet.plan import make_plan, settle_batch
from agvm_ds.mmdet.train import TrainOptions, prepare, splits_read
from tests.mmdet import coco
from tests.mmdet.mistakes import TABLE, Bad, bad
from tests.trainer import ROOT, write_config

AGVM = {"precondition": "none"}
LIMIT = 10.0
"""Seconds in which a mistake must be told; they take about a tenth of one."""


def up_to_the_model(options: TrainOptions) -> None:
    """What ``train`` does before it needs other ranks."""
    _, cfg, _ = prepare(options)
    check_on_hosts(cfg, splits_read(options, cfg), options.allow_other_categories)


def start(row: Bad, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``launch/train.py`` with a row's mistake in it."""
    coco.write(place, row.data)
    config = write_config(place, coco.config_lines(place) + row.config)
    (place / "ds.json").write_text(row.text if row.text is not None else json.dumps(row_json(row)))
    row.files(place)
    words = [word.replace("{place}", str(place)) for word in row.words]
    named = [] if words and not words[0].startswith("-") else [str(config)]
    standing = {"--deepspeed_config": str(place / "ds.json"), "--work-dir": str(place / "work")}
    given = [word for key, value in standing.items() if key not in words for word in (key, value)]
    monkeypatch.setattr(agvm_ds.mmdet.train, "train", up_to_the_model)
    monkeypatch.setattr(sys, "argv", ["train.py", *named, *given, *words])
    runpy.run_path(str(ROOT / "launch/train.py"))["main"]()


@pytest.fixture
def collected() -> Iterator[None]:
    """The open files that mmcv leaves when a config fails are closed now: within the next ast.parse, Python 3.11 stumbles."""
    yield
    gc.collect()


def row_json(row: Bad) -> dict[str, Any]:
    return {"train_batch_size": 16, "agvm": AGVM, **row.json}


def test_what_every_row_spoils_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(bad(), tmp_path, monkeypatch)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", TABLE)
def test_bad_input_is_told_in_one_message(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """A ConfigError and nothing else, at once, with what is wrong, and no file in the work dir."""
    if TABLE[name].leaves_files:
        request.getfixturevalue("collected")
    begun = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        start(TABLE[name], tmp_path, monkeypatch)
    assert time.monotonic() - begun < LIMIT
    assert [word for word in TABLE[name].said if word not in str(caught.value)] == [], str(caught.value)
    assert not [path for path in (tmp_path / "work").rglob("*") if path.is_file()]


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "ds.json").write_text(json.dumps({"train_batch_size": 16, "agvm": AGVM}))
    return {"deepspeed_config": str(tmp_path / "ds.json"), "work_dir": str(tmp_path / "work")}


def test_good_input_is_accepted(options: dict[str, Any]) -> None:
    plan, cfg, _ = prepare(TrainOptions(**options))
    assert (plan.batch.micro, plan.batch.accumulation, plan.batch.ranks) == (4, 4, 1)
    assert plan.deepspeed["gradient_clipping"] == cfg.optimizer_config.grad_clip.max_norm


def test_shipped_configs_are_found_with_and_without_their_folder() -> None:
    whole = config_path("faster_rcnn/faster_rcnn_r50_fpn_1x_coco")
    assert whole == config_path("faster_rcnn_r50_fpn_1x_coco")
    assert whole.is_file()


def test_an_old_config_counts_its_epochs_without_a_runner(tmp_path: Path) -> None:
    """As mmdet reads it."""
    cfg = read_config(str(write_config(tmp_path, "del runner\ntotal_epochs = 3")))
    assert (cfg.runner.type, cfg.runner.max_epochs) == ("EpochBasedRunner", 3)


def test_an_old_config_counts_its_images_by_another_name(tmp_path: Path) -> None:
    """As mmdet reads it."""
    cfg = read_config(str(write_config(tmp_path, 'data.pop("samples_per_gpu")\ndata["imgs_per_gpu"] = 2')))
    assert make_plan({"train_batch_size": 16}, cfg, 2).batch.micro == 2


def test_batch_arithmetic_of_several_ranks() -> None:
    with pytest.raises(ConfigError, match=r"16 does not divide .* 4 images x 3 ranks = 12"):
        settle_batch({"train_batch_size": 16}, 4, 3)


def test_clipping_is_off_unless_someone_asks() -> None:
    """DeepSpeed 0.19 clips to 1 when its key is absent; an mmdet config without grad_clip means no clipping."""
    cfg = read_config(None)
    cfg.optimizer_config = {}
    assert make_plan({"train_batch_size": 16}, cfg, 1).deepspeed["gradient_clipping"] == 0.0
    assert make_plan({"train_batch_size": 16, "gradient_clipping": 3.0}, cfg, 1).deepspeed["gradient_clipping"] == 3.0


def test_the_table_is_long() -> None:
    assert len(TABLE) >= 150
