"""The ``agvm`` block: defaults, one case per mistake, and what is imported to read it."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from agvm_ds.config import AGVMConfig, ConfigError, read_block

DEFAULTS = {
    "enabled": True,
    "modulate": True,
    "anchor": "backbone",
    "modules": None,
    "estimator": "pairwise",
    "precondition": "auto",
    "interval": 10,
    "start_step": 0,
    "stop_step": None,
    "ema_decay": 0.97,
    "ratio_bounds": (0.5, 10.0),
    "eps": 1e-6,
    "reduce_bucket_size": 500_000_000,
    "clip_window": None,
}

NOT_MODULES = "must be null, a list of names, or an object name -> list of prefixes"
NOT_AROUND_ONE = "0 < low <= 1 <= high"

MISTAKES: list[tuple[dict[str, Any], str, str]] = [
    ({"intervall": 5}, "agvm.intervall", "unknown key; did you mean interval?"),
    ({"zzz": 5}, "agvm.zzz", "unknown key; allowed: enabled, modulate, anchor, modules"),
    ({"enabled": "yes"}, "agvm.enabled = 'yes'", "boolean"),
    ({"enabled": 1}, "agvm.enabled = 1", "boolean"),
    ({"modulate": "no"}, "agvm.modulate = 'no'", "boolean"),
    ({"anchor": 3}, "agvm.anchor = 3", "string"),
    ({"anchor": ""}, "agvm.anchor = ''", "at least 1 character"),
    ({"anchor": None}, "agvm.anchor = None", "string"),
    ({"modules": "backbone"}, "agvm.modules", NOT_MODULES),
    ({"modules": {"neck": "neck"}}, "agvm.modules", NOT_MODULES),
    ({"modules": [1, 2]}, "agvm.modules", NOT_MODULES),
    ({"modules": [""]}, "agvm.modules", NOT_MODULES),
    ({"modules": []}, "agvm.modules", "no module is named"),
    ({"modules": {}}, "agvm.modules", "no module is named"),
    ({"modules": {"neck": []}}, "agvm.modules", "no prefix is given for neck"),
    ({"modules": ["neck", "backbone", "neck"]}, "agvm.modules", "a name is given twice"),
    ({"reduce_bucket_size": 0}, "agvm.reduce_bucket_size = 0", "greater than or equal to 1"),
    ({"reduce_bucket_size": 0.5}, "agvm.reduce_bucket_size = 0.5", "valid integer"),
    ({"reduce_bucket_size": True}, "agvm.reduce_bucket_size = True", "valid integer"),
    ({"estimator": "halves"}, "agvm.estimator = 'halves'", "'pairwise'"),
    ({"precondition": "always"}, "agvm.precondition = 'always'", "'auto' or 'none'"),
    ({"interval": 0}, "agvm.interval = 0", "greater than or equal to 1"),
    ({"interval": 2.5}, "agvm.interval = 2.5", "integer"),
    ({"interval": True}, "agvm.interval = True", "integer"),
    ({"interval": "10"}, "agvm.interval = '10'", "integer"),
    ({"start_step": -1}, "agvm.start_step = -1", "greater than or equal to 0"),
    ({"start_step": None}, "agvm.start_step = None", "integer"),
    (
        {"start_step": 5, "stop_step": 4},
        "agvm.stop_step = 4",
        "stops before it starts; allowed: null or >= start_step = 5",
    ),
    ({"stop_step": -1}, "agvm.stop_step = -1", "greater than or equal to 0"),
    ({"ema_decay": 1.01}, "agvm.ema_decay = 1.01", "less than or equal to 1"),
    ({"ema_decay": -0.1}, "agvm.ema_decay = -0.1", "greater than or equal to 0"),
    ({"ema_decay": math.nan}, "agvm.ema_decay = nan", "1"),
    ({"ema_decay": "0.97"}, "agvm.ema_decay = '0.97'", "number"),
    ({"eps": 0}, "agvm.eps = 0", "greater than 0"),
    ({"eps": -1e-6}, "agvm.eps = -1e-06", "greater than 0"),
    ({"eps": math.inf}, "agvm.eps = inf", "finite number"),
    ({"ratio_bounds": [10.0, 0.5]}, "agvm.ratio_bounds = ", NOT_AROUND_ONE),
    ({"ratio_bounds": [2.0, 10.0]}, "agvm.ratio_bounds = ", NOT_AROUND_ONE),
    ({"ratio_bounds": [0.1, 0.9]}, "agvm.ratio_bounds = ", NOT_AROUND_ONE),
    ({"ratio_bounds": [0, 10.0]}, "agvm.ratio_bounds = ", NOT_AROUND_ONE),
    ({"ratio_bounds": [math.nan, 10.0]}, "agvm.ratio_bounds = ", NOT_AROUND_ONE),
    ({"ratio_bounds": [0.5]}, "agvm.ratio_bounds", ""),
    ({"ratio_bounds": [0.5, 1.0, 2.0]}, "agvm.ratio_bounds", "2 items"),
    ({"ratio_bounds": 2.0}, "agvm.ratio_bounds", "tuple"),
    ({"ratio_bounds": ["0.5", 10.0]}, "agvm.ratio_bounds", "number"),
    ({"clip_window": [10, 5]}, "agvm.clip_window = ", "first <= last"),
    ({"clip_window": [-1, 5]}, "agvm.clip_window", "greater than or equal to 0"),
    ({"clip_window": [0, 5.5]}, "agvm.clip_window", "integer"),
    ({"clip_window": 5}, "agvm.clip_window", "tuple"),
]


def test_an_empty_block_has_the_documented_defaults() -> None:
    config = read_block({"agvm": {}})
    assert config is not None
    assert config.model_dump() == DEFAULTS


def test_every_key_is_read() -> None:
    block = {
        "enabled": True,
        "modulate": False,
        "anchor": "neck",
        "modules": {"neck": ["neck"], "heads": ["rpn_head", "roi_head"]},
        "estimator": "split",
        "precondition": "none",
        "interval": 1,
        "start_step": 3,
        "stop_step": 3,
        "ema_decay": 0,
        "ratio_bounds": [1, 1],
        "eps": 1e-3,
        "reduce_bucket_size": 1e6,
        "clip_window": [0, 0],
    }
    config = read_block({"agvm": block})
    assert config is not None
    assert config.model_dump() == block | {"ratio_bounds": (1.0, 1.0), "clip_window": (0, 0)}
    assert block.keys() == DEFAULTS.keys()


@pytest.mark.parametrize(("block", "path", "words"), MISTAKES, ids=lambda value: repr(value)[:40])
def test_a_mistake_is_refused_with_its_path_and_what_is_allowed(block: dict[str, Any], path: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_block({"agvm": block})
    message = str(caught.value)
    assert 'the "agvm" block has 1 mistake:' in message
    assert path in message
    assert words in message


@pytest.mark.parametrize("block", [True, [], "on", 3])
def test_a_block_that_is_no_object_is_refused(block: Any) -> None:
    with pytest.raises(ConfigError, match="agvm: must be an object"):
        read_block({"agvm": block})


def test_several_mistakes_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        read_block({"agvm": {"interval": 0, "ancor": "backbone", "modules": "neck", "ratio_bounds": [3, 2], "eps": -1}})
    message = str(caught.value)
    assert "has 5 mistakes:" in message
    for path in ("agvm.interval", "agvm.ancor", "agvm.modules", "agvm.ratio_bounds", "agvm.eps"):
        assert message.count(f"\n  {path}") == 1


def test_a_wrong_start_does_not_hide_behind_the_stop() -> None:
    with pytest.raises(ConfigError, match="has 1 mistake:\n  agvm.start_step"):
        read_block({"agvm": {"start_step": "soon", "stop_step": 5}})


def test_a_clip_window_needs_clipping_to_limit() -> None:
    block = {"clip_window": [0, 5]}
    with pytest.raises(ConfigError, match="agvm.clip_window: limits gradient_clipping, which is 0"):
        read_block({"agvm": block, "gradient_clipping": 0.0})
    assert read_block({"agvm": block, "gradient_clipping": 0.5}) is not None
    assert read_block({"agvm": block}) is not None, "DeepSpeed clips to 1 when the key is absent"


def test_a_block_that_is_off_or_absent_is_none() -> None:
    assert read_block({}) is None
    assert read_block({"agvm": None}) is None
    assert read_block({"agvm": {"enabled": False}}) is None


def test_a_block_that_is_off_is_checked_all_the_same() -> None:
    with pytest.raises(ConfigError, match="agvm.interval = 0"):
        read_block({"agvm": {"enabled": False, "interval": 0}})


def test_windows_include_both_ends() -> None:
    config = AGVMConfig(start_step=4, stop_step=8, interval=4, clip_window=(3, 5))
    assert [t for t in range(12) if config.active(t)] == [4, 5, 6, 7, 8]
    assert [t for t in range(12) if config.measured(t)] == [4, 8]
    assert [t for t in range(12) if config.clips(t)] == [3, 4, 5]


def test_measures_fall_on_multiples_of_the_interval_and_not_on_the_start() -> None:
    config = AGVMConfig(start_step=3, interval=4)
    assert [t for t in range(13) if config.measured(t)] == [4, 8, 12]
    assert [t for t in range(13) if config.active(t)] == list(range(3, 13))


def test_without_limits_everything_is_active_and_clipped() -> None:
    config = AGVMConfig(interval=1)
    assert all(config.active(t) and config.measured(t) and config.clips(t) for t in (0, 1, 10**6))


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("config", ["torch", "deepspeed", "mmdet", "mmcv"]),
        ("variance", ["torch", "deepspeed", "mmdet", "mmcv"]),
        ("groups", ["deepspeed", "mmdet", "mmcv"]),
    ],
)
def test_the_light_modules_import_nothing_heavy(module: str, banned: list[str]) -> None:
    code = f"import sys, agvm_ds.{module}; print([name for name in {banned!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
