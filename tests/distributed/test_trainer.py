"""launch/train.py as a user starts it, with DeepSpeed's launcher: a few updates, a resume, plain mmdet on the result."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from agvm_ds.demo.data import ensure
from agvm_ds.mmdet.checks.disk import checkpoints_of
from agvm_ds.mmdet.configs import read_config
from agvm_ds.mmdet.testing.saved import read_published
from tests.launch import launch_port
from tests.trainer import ROOT, cfg_options, data_options, launch, logged, write_config, write_json

OPTIONS = {
    "lr_config.warmup_iters": 2,
    "checkpoint_config.interval": 1,
    "log_config.interval": 1,
    "runner.max_epochs": 2,
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure(tmp_path_factory.mktemp("data") / "digits", train=48, val=8)


AVERAGES = 'custom_hooks.append(dict(type="ExpMomentumEMAHook", momentum=0.2, total_iter=4, priority=49))'


def words(json_file: Path, work_dir: Path, digits: Path, *more: str) -> list[str]:
    """The command line after launch/train.py."""
    config = write_config(work_dir.parent, AVERAGES)
    named = [str(config), "--deepspeed_config", str(json_file), "--work-dir", str(work_dir)]
    return [*named, "--seed", "0", *more, *cfg_options({**data_options(digits), **OPTIONS})]


def with_launcher(script: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """What ``deepspeed --num_gpus 2 script`` printed and how it ended."""
    with launch_port() as port:
        return subprocess.run(
            ["deepspeed", "--num_gpus", "2", "--master_port", str(port), str(script), *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )


def tool(script: str, *words: str) -> tuple[int, str]:
    """How a script of ``launch/`` that needs no ranks ended, and what it said."""
    done = subprocess.run(
        [sys.executable, f"launch/{script}", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module", params=[2, 3])
def work_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A finished run of two epochs, three updates each; stage 2 as a user starts it, stage 3 with a scheduler of DeepSpeed's.

    Its folder is named like a pattern.
    """
    place = tmp_path_factory.mktemp(f"stage{request.param}")
    settings = json.loads((ROOT / f"ds_configs/agvm_zero{request.param}.json").read_text())
    settings["agvm"] |= {"interval": 2, "start_step": 1}
    if request.param == 3:
        warm_up = {"warmup_min_lr": 0.001, "warmup_max_lr": 0.006, "warmup_num_steps": 4, "warmup_type": "linear"}
        settings["scheduler"] = {"type": "WarmupLR", "params": warm_up}
    arguments = words(write_json(place, settings), place / "lr=[0.25, 4]", digits)
    if request.param == 2:
        done = with_launcher(ROOT / "launch/train.py", arguments)
        assert done.returncode == 0, done.stdout
    else:
        outcome = launch("train.py", arguments, place)
        assert outcome.good, outcome.output
    return place / "lr=[0.25, 4]"


def test_the_work_dir_is_complete(work_dir: Path) -> None:
    names = {path.name for path in work_dir.iterdir()}
    assert names >= {
        "agvm.jsonl",
        "config.py",
        "deepspeed.json",
        "epoch_1.pth",
        "epoch_2.pth",
        "latest.pth",
        "modules.png",
    }
    assert [json.loads(line)["update"] for line in (work_dir / "agvm.jsonl").read_text().splitlines()] == [2, 4]
    assert (work_dir / "deepspeed" / "latest").read_text() == "epoch_2"
    config = (work_dir / "config.py").read_text()
    assert read_config(str(work_dir / "config.py")).model.type == "FasterRCNN"
    assert torch.load(work_dir / "latest.pth", weights_only=True)["meta"]["config"] == config


def test_the_log_tells_what_each_module_stepped_with(work_dir: Path) -> None:
    """In updates 1, 3, 5 of 0 to 5, whose lines are the 2nd, 4th, 6th, and in measured ones alike."""
    lines = logged(work_dir, "train")
    measures = {
        one["update"]: one["modules"] for one in map(json.loads, (work_dir / "agvm.jsonl").read_text().splitlines())
    }
    assert len(lines) == 6
    for update, line in enumerate(lines):
        assert line["images/s"] > 0 and line["grad_norm"] > 0
        for name in ("backbone", "neck", "rpn_head", "roi_head"):
            mu = line[f"mu/{name}"]
            # mmcv rounds its own to five places
            assert line[f"lr/{name}"] == pytest.approx(line["lr"] * (mu if update >= 1 else 1), abs=1.1e-5)
            if update in measures:
                assert line[f"lr/{name}"] == pytest.approx(measures[update][name]["effective_lr"], rel=1e-4)
            if update in measures:
                found = measures[update][name]
                assert mu == pytest.approx(found["scale_factor"], abs=1.1e-5)
                assert found["effective_lr"] == found["lr"] * found["scale_factor"]
                assert found["noise_scale"] in ("inf", pytest.approx(found["noise"] / found["signal"]))
    assert lines[-1]["mu/neck"] != 1
    assert re.search(r"lr/neck: \d\.\d{3}e-03", max(work_dir.glob("*.log")).read_text())
    assert [key for line in logged(work_dir) for key in line if key.startswith(("lr/", "mu/"))] == []


def test_a_run_is_reported(work_dir: Path, tmp_path: Path) -> None:
    assert tool("report.py", str(work_dir), str(work_dir), "--out", str(tmp_path / "report"))[0] == 0
    page = (tmp_path / "report/index.html").read_text()
    assert "launch/train.py" in page and "batch 16 = 4 images a micro-batch" in page and "bbox_mAP" in page
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} >= {"loss", "score", "variance", "noise_scale"}
    code, said = tool("advise.py", str(work_dir))
    assert code == 2 and "1 measures in the last 50% of the run; at least 10 are needed" in said
    code, said = tool("advise.py", str(work_dir), "--batches", "32", "--part", "2")
    assert code == 2 and "--part 2.0: must be above 0 and at most 1" in said


def test_checkpoints_take_the_room_that_was_estimated(work_dir: Path) -> None:
    """AdamW, with two states. The averages are once more the weights, of which stage 3 writes none but the master copy."""
    needed = checkpoints_of(read_config(str(work_dir / "config.py")))
    more = needed.weights if work_dir.parent.name.startswith("stage2") else 0
    found = sum(path.stat().st_size for path in (work_dir / "deepspeed/epoch_2").iterdir())
    assert found == pytest.approx(needed.state + more, rel=0.05)
    assert (work_dir / "epoch_2.pth").stat().st_size == pytest.approx(needed.weights, rel=0.05)


def test_a_checkpoint_read_without_ranks_is_what_was_published(work_dir: Path) -> None:
    """In stage 2 that is the average of the weights, not those that are trained."""
    for tag in ("epoch_1", "epoch_2"):
        published = torch.load(work_dir / f"{tag}.pth", weights_only=True)["state_dict"]
        found = read_published(work_dir / "deepspeed" / tag).weights
        assert published.keys() == found.keys()
        assert [name for name in found if not torch.equal(found[name], published[name])] == []


def test_plain_mmdet_loads_what_is_published(work_dir: Path) -> None:
    from mmdet.apis import init_detector

    saved = torch.load(work_dir / "latest.pth", weights_only=True)
    assert "optimizer" not in saved
    detector = init_detector(str(work_dir / "config.py"), str(work_dir / "latest.pth"), device="cpu")
    assert list("0123456789") == detector.CLASSES or tuple(detector.CLASSES) == tuple("0123456789")
    loaded = detector.state_dict()
    assert saved["state_dict"].keys() == loaded.keys()
    assert all(torch.equal(value, loaded[name]) for name, value in saved["state_dict"].items())


def test_a_resumed_run_is_the_whole_run(work_dir: Path, digits: Path) -> None:
    """Killed after its first epoch and resumed: the second epoch's weights and measures are bit for bit the same."""
    whole = torch.load(work_dir / "epoch_2.pth", weights_only=True)["state_dict"]
    measures = (work_dir / "agvm.jsonl").read_text()
    (work_dir / "deepspeed" / "latest").write_text("epoch_1")
    (work_dir / "epoch_2.pth").unlink()
    arguments = words(work_dir.parent / "ds.json", work_dir, digits, "--resume")
    outcome = launch("train.py", arguments, work_dir.parent)
    assert outcome.good, outcome.output
    again = torch.load(work_dir / "epoch_2.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert (work_dir / "agvm.jsonl").read_text() == measures
    logs = {file.name.split(".")[0] for file in work_dir.glob("*.log.json")}
    assert len(logs) == 2 and set(json.loads((work_dir / "run.json").read_text())["logs"]) == logs


DELAYED = """
import os, runpy, sys, time
if os.environ["RANK"] == "0":
    time.sleep(4)
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def test_a_mistake_ends_the_whole_launch_with_one_message(tmp_path: Path, digits: Path) -> None:
    """Rank 0 is late: DeepSpeed's launcher kills it as soon as the other has ended, which once lost the message."""
    json_file = write_json(tmp_path, {"train_batch_size": 16, "agvm": {"anchor": "bakbone", "intervall": 3}})
    script = tmp_path / "delayed.py"
    script.write_text(DELAYED.format(script=str(ROOT / "launch/train.py")))
    done = with_launcher(script, words(json_file, tmp_path / "work", digits))
    assert done.returncode != 0
    assert done.stdout.count("error: ") == 1
    assert "agvm.intervall: unknown key; did you mean interval?" in done.stdout
    assert "Traceback" not in done.stdout
