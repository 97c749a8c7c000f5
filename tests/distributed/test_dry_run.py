"""launch/train.py --dry-run: what it tells of a run, and that it leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agvm_ds.mmdet.configs import detector_of, read_config
from tests.trainer import ROOT, cfg_options, data_options, launch, write_config, write_json


def arguments(place: Path, digits: Path, stage: int, agvm: bool) -> list[str]:
    settings = json.loads((ROOT / f"ds_configs/agvm_zero{stage}.json").read_text())
    settings["agvm"] |= {"enabled": agvm, "interval": 2, "start_step": 1, "clip_window": [0, 3]}
    settings["tensorboard"] = {"enabled": True, "output_path": str(place / "board"), "job_name": "dry"}
    config = write_config(place, 'model["backbone"]["frozen_stages"] = 1')
    words = [str(config), "--deepspeed_config", str(write_json(place, settings)), "--work-dir", str(place / "work")]
    options = {"lr_config.warmup_iters": 2, "runner.max_epochs": 2}
    return [*words, "--seed", "0", "--dry-run", *cfg_options({**data_options(digits), **options})]


def cells(output: str, start: str) -> list[str]:
    """Of the first printed row that begins with ``start``."""
    row = next(line for line in output.splitlines() if line.startswith(f"│ {start} "))
    return [cell.strip() for cell in row.strip("│").split("│")][1:]


@pytest.mark.parametrize(("stage", "agvm"), [(0, False), (2, True), (3, False)])
def test_it_tells_the_run_and_leaves_nothing(stage: int, agvm: bool, digits: Path, tmp_path: Path) -> None:
    outcome = launch("train.py", arguments(tmp_path, digits, stage, agvm), tmp_path)
    assert outcome.good, outcome.output
    text = outcome.output
    assert not (tmp_path / "work").exists() and not (tmp_path / "board").exists()
    assert "16 = 4 images a micro-batch x 2 accumulation steps x 2 ranks" in text
    assert cells(text, "updates") == ["6"]
    assert [cells(text, str(update))[0] for update in (0, 2)] == ["6e-05", "0.004515"], (
        "warm-up from 1 %, then the cosine"
    )
    loss = float(cells(text, "loss")[0])
    assert 1 < loss < 10
    if stage == 0:  # in fp32 DeepSpeed computes no norm there
        assert "gradient norm" not in text
    else:
        assert 0.1 < float(cells(text, "gradient norm")[0]) < 100
    assert cells(text, f"{stage} (this run)")
    if agvm:
        counts = [int(cells(text, name)[0].replace(",", "")) for name in ("backbone", "neck", "rpn_head", "roi_head")]
        frozen = int(cells(text, "backbone")[2].replace(",", ""))
        whole = sum(p.numel() for p in detector_of(read_config(str(tmp_path / "digits_config.py"))).parameters())
        assert frozen > 0 and sum(counts) + frozen == whole
        assert cells(text, "measures") == ["2: updates 2 to 4, every 2"]
        assert cells(text, "clipping") == ["updates 0 to 3"]
        assert "has 2 measures, and the moving average remembers 33" in text
        assert "agvm.start_step = 1 is within the warm-up of 2 updates" in text


def test_a_run_that_is_resumed_is_not_rehearsed(digits: Path, tmp_path: Path) -> None:
    outcome = launch("train.py", [*arguments(tmp_path, digits, 2, True), "--resume"], tmp_path)
    assert outcome.codes == [2, 2] and "--dry-run shows a run from its beginning: leave out --resume" in outcome.output
