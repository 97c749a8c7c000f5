"""launch/train.py as a user starts it, with DeepSpeed's launcher: a few updates, a resume, plain mmdet on the result."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from agvm_ds.demo.data import ensure

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure(tmp_path_factory.mktemp("data") / "digits", train=48, val=8)


def launch(json_file: Path | str, work_dir: Path, digits: Path, *more: str, port: int = 29511) -> str:
    """Run the launcher with two ranks and return what it printed; its exit code is the first line."""
    data = [
        f"data.{split}.{key}={digits / value}"
        for split, folder in (("train", "train"), ("val", "val"), ("test", "val"))
        for key, value in (("ann_file", f"annotations/{folder}.json"), ("img_prefix", folder))
    ]
    settings = [*data, "lr_config.warmup_iters=2", "checkpoint_config.interval=1", "log_config.interval=1"]
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(port), str(ROOT / "launch/train.py")]
    # A copy of the config under another name: the demo itself would look for its own data.
    config = work_dir.parent / "digits_config.py"
    config.write_text((ROOT / "agvm_ds/demo/faster_rcnn_digits.py").read_text())
    command += [str(config), "--deepspeed_config", str(json_file), "--work-dir", str(work_dir), "--seed", "0", *more]
    done = subprocess.run(
        [*command, "--cfg-options", *settings, "runner.max_epochs=2"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    return f"{done.returncode}\n{done.stdout}"


@pytest.fixture(scope="module", params=[2, 3])
def work_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A finished run of two epochs, three updates each."""
    place = tmp_path_factory.mktemp(f"stage{request.param}")
    settings = json.loads((ROOT / f"ds_configs/agvm_zero{request.param}.json").read_text())
    settings["agvm"] |= {"interval": 2, "start_step": 1}
    (place / "ds.json").write_text(json.dumps(settings))
    output = launch(place / "ds.json", place / "work", digits)
    assert output.startswith("0\n"), output
    return place / "work"


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
    output = launch(work_dir.parent / "ds.json", work_dir, digits, "--resume", port=29512)
    assert output.startswith("0\n"), output
    again = torch.load(work_dir / "epoch_2.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert (work_dir / "agvm.jsonl").read_text() == measures


def test_a_mistake_ends_the_whole_launch_with_one_message(tmp_path: Path, digits: Path) -> None:
    (tmp_path / "ds.json").write_text(
        json.dumps({"train_batch_size": 16, "agvm": {"anchor": "bakbone", "intervall": 3}})
    )
    output = launch(tmp_path / "ds.json", tmp_path / "work", digits, port=29513)
    assert not output.startswith("0\n")
    assert output.count("error: ") == 1
    assert "agvm.intervall: unknown key; did you mean interval?" in output
    assert "Traceback" not in output
