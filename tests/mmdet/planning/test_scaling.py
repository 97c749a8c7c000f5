"""The rules of agvm_ds.mmdet.planning.scaling against the official recipes, written out here from their configs."""

from __future__ import annotations

import pytest

from agvm_ds.config import ConfigError
from agvm_ds.mmdet.planning import scaling
from agvm_ds.mmdet.planning.scaling import COCO_IMAGES, Windows, default_rule, scaled_rate, windows

OFFICIAL = {256: Windows(920, 1020, (820, 1020), 10), 512: Windows(460, 560, (360, 560), 10)}
"""warmup_iters, lr_update_start_iter, grad_clip_iter_range, lr_update_interval of Sense-X/AGVM's configs."""


@pytest.mark.parametrize("batch", OFFICIAL)
def test_the_official_windows_come_out_of_the_rule(batch: int) -> None:
    assert windows(COCO_IMAGES, batch) == OFFICIAL[batch]


def test_agvm_measures_more_often_from_1024() -> None:
    assert [windows(COCO_IMAGES, batch).interval for batch in (1023, 1024, 4096)] == [10, 5, 5]


def test_a_short_warm_up_is_clipped_from_the_first_update() -> None:
    assert windows(2048, 512) == Windows(10, 110, (0, 110), 10)


@pytest.mark.parametrize(("batch", "rate"), [(128, 0.16), (256, 0.16 * 2**0.5), (512, 0.32)])
def test_linear_to_128_and_square_root_beyond_is_the_official_rate_from_mmdets_own(batch: int, rate: float) -> None:
    assert scaled_rate(0.02, 16, batch, "linear-sqrt") == pytest.approx(rate)


def test_it_differs_from_what_is_published_for_one_recipe_only() -> None:
    by_rule = {key: scaled_rate(0.02, 16, key[1], "linear-sqrt") for key in scaling.PUBLISHED}
    assert [key for key, rate in scaling.PUBLISHED.items() if rate != pytest.approx(by_rule[key])] == [
        ("FasterRCNN", 512)
    ]


def test_linear_and_square_root() -> None:
    assert scaled_rate(0.02, 16, 512, "linear") == pytest.approx(0.64)
    assert scaled_rate(0.02, 16, 512, "sqrt") == pytest.approx(0.02 * 32**0.5)


@pytest.mark.parametrize("rule", scaling.RULES)
@pytest.mark.parametrize("base", [16, 128, 192])
def test_each_rule_keeps_the_base_and_undoes_itself(rule: str, base: int) -> None:
    assert scaled_rate(0.02, base, base, rule) == pytest.approx(0.02)
    assert scaled_rate(scaled_rate(0.02, base, 640, rule), 640, base, rule) == pytest.approx(0.02)


def test_a_base_beyond_128_is_scaled_by_the_square_root_only() -> None:
    assert scaled_rate(0.02, 192, 768, "linear-sqrt") == pytest.approx(0.04)


def test_the_rule_follows_the_optimizer() -> None:
    assert [default_rule(name) for name in ("SGD", "Adam", "AdamW", "RMSprop")] == [
        "linear-sqrt",
        "sqrt",
        "sqrt",
        "sqrt",
    ]


def test_agvm_must_start_before_the_run_ends() -> None:
    scaling.refuse_late_start(560, 561)
    with pytest.raises(ConfigError, match="would start at update 560, and the run's last is update 559"):
        scaling.refuse_late_start(560, 560)
