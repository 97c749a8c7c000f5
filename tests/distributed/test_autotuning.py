"""launch/train.py as DeepSpeed's autotuner starts it: a few updates, a file of figures, and no word of an error."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from tests.trainer import cfg_options, data_options, launch, write_config


def test_an_experiment_leaves_its_figures(digits: Path, tmp_path: Path) -> None:
    """The autotuner passes the JSON in base64, and takes a run whose output has the word "error" for failed."""
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 2},
        "agvm": {"interval": 1},
        "autotuning": {
            "enabled": True,
            "start_profile_step": 1,
            "end_profile_step": 2,
            "metric_path": str(tmp_path / "metrics.json"),
        },
    }
    passed = base64.urlsafe_b64encode(json.dumps(settings).encode()).decode()
    words = [str(write_config(tmp_path)), "--deepspeed_config", passed, "--work-dir", str(tmp_path / "work")]
    outcome = launch("train.py", [*words, *cfg_options(data_options(digits))], tmp_path)
    assert outcome.good and "error" not in outcome.output.lower(), outcome.output
    assert json.loads((tmp_path / "metrics.json").read_text())["throughput"] > 0
