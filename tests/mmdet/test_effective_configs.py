"""The JSON and the config that a work dir keeps start the same run again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from agvm_ds.config import read_block
from agvm_ds.deepspeed_json import load_config
from agvm_ds.groups import param_groups
from agvm_ds.mmdet.configs import read_config
from agvm_ds.mmdet.plan import make_plan
from agvm_ds.mmdet.record import write_record


class Net(nn.Module):
    """Two modules, and a parameter outside them."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.neck = nn.Linear(2, 2), nn.Linear(2, 2)
        self.scale = nn.Parameter(nn.Linear(1, 1).weight)


@pytest.mark.parametrize("modules", [None, ["neck", "backbone"], {"backbone": ["backbone", "neck"]}])
def test_the_modules_are_those_of_the_run(modules: Any, tmp_path: Path) -> None:
    """Once a list of all the names: a dict's prefixes were lost, and ``rest`` covers no parameter."""
    settings = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "agvm": {"modules": modules}}
    cfg = read_config(None)
    plan = make_plan(settings, cfg, ranks=2)
    net = Net()
    engine = SimpleNamespace(module=net, agvm=SimpleNamespace(config=plan.agvm))
    meta = {"config": cfg.pretty_text}
    runner = SimpleNamespace(
        rank=0, engine=engine, work_dir=tmp_path, meta=meta, updates_per_epoch=10, timestamp="20260102_000000"
    )
    write_record(cfg, plan, runner, 20, resumed=False)
    again = load_config(tmp_path / "deepspeed.json")
    block = read_block(again)
    assert block is not None
    names = [group["module"] for group in param_groups(net, block.modules)]
    chosen = modules or ["backbone", "neck"]
    assert names == [group["module"] for group in param_groups(net, chosen)]
    assert "rest" in names
    assert again["gradient_accumulation_steps"] == 4
    assert read_config(str(tmp_path / "config.py")).data.train_dataloader.samples_per_gpu == 2


def test_a_runs_logs_are_on_record(tmp_path: Path) -> None:
    """A new run has one, whatever is there; a resumed one has those of before: as run.json says, else all."""
    cfg = read_config(None)
    plan = make_plan({"train_batch_size": 16}, cfg, ranks=2)
    engine = SimpleNamespace(module=Net(), agvm=None)

    def logs(time: str, resumed: bool) -> list[str]:
        runner = SimpleNamespace(
            rank=0, engine=engine, work_dir=tmp_path, meta={"config": ""}, updates_per_epoch=None, timestamp=time
        )
        write_record(cfg, plan, runner, 20, resumed)
        return list(json.loads((tmp_path / "run.json").read_text())["logs"])

    (tmp_path / "1.log.json").touch()
    assert logs("2", resumed=True) == ["1", "2"]
    assert logs("3", resumed=False) == ["3"]
    assert logs("4", resumed=True) == ["3", "4"]
