"""The formulas, against brute force over all splits of the micro-batches and against numbers worked out by hand."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from agvm_ds.variance import (
    micro_moments,
    moving_average,
    noise_scale,
    pairwise_variance,
    split_variance,
    variance_ratio,
)

SQRT_HALF = math.sqrt(0.5)

# name, micro-gradients, m, c, Phi, B of a micro-batch of 4 images: worked out by hand
GOLDEN = [
    ("equal", [[3.0, 4.0], [3.0, 4.0]], 25.0, 25.0, 0.0, 0.0),
    ("opposite", [[1.0, 2.0], [-1.0, -2.0]], 5.0, -5.0, 2.0, math.inf),
    ("orthogonal", [[1.0, 0.0], [0.0, 1.0]], 1.0, 0.0, 1.0, math.inf),
    ("one is zero", [[2.0, 0.0], [0.0, 0.0]], 2.0, 0.0, 1.0, math.inf),
    ("different lengths", [[1.0, 0.0], [3.0, 0.0]], 5.0, 3.0, 0.4, 8 / 3),
    ("at 60 degrees", [[1.0, 0.0], [0.5, math.sqrt(0.75)]], 1.0, 0.5, 0.5, 4.0),
    ("three", [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], 1.0, 1 / 3, 4 / 7, 8.0),
    ("four", [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, -1.0]], 2.0, 1.0, 1 / 3, 4.0),
]


def sums(gradients: list[list[float]] | torch.Tensor) -> tuple[float, float, int]:
    """(S2, G2, n) of the micro-gradients."""
    g = torch.as_tensor(gradients, dtype=torch.float64)
    return float(g.square().sum()), float(g.mean(0).square().sum()), len(g)


def random_gradients(n: int, seed: int, agreement: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(7, generator=generator, dtype=torch.float64)
    return agreement * shared + torch.randn(n, 7, generator=generator, dtype=torch.float64)


def over_all_splits(gradients: torch.Tensor) -> float:
    """1 - E<G_A, G_B> / E|G_A|^2 with both means over every way to halve the micro-batches."""
    n = len(gradients)
    inner, square = [], []
    for a in combinations(range(n), n // 2):
        b = [k for k in range(n) if k not in a]
        half_a, half_b = gradients[list(a)].mean(0), gradients[b].mean(0)
        inner.append(float(half_a @ half_b))
        square.append(float(half_a @ half_a))
    return 1 - sum(inner) / sum(square)


@pytest.mark.parametrize("n", [2, 4, 6])
@pytest.mark.parametrize("agreement", [0.0, 0.3, 1.0, 5.0])
def test_pairwise_is_the_mean_over_all_splits(n: int, agreement: float) -> None:
    for seed in range(5):
        gradients = random_gradients(n, seed, agreement)
        expected = min(max(over_all_splits(gradients), 0.0), 2.0)
        assert pairwise_variance(*sums(gradients)) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_two_micro_batches_of_equal_length_have_one_minus_their_cosine() -> None:
    """With n = 2 there is one split; the ratio of expectations is the cosine itself when the lengths agree."""
    for seed in range(5):
        g = random_gradients(2, seed, 1.0)
        g = g / g.norm(dim=1, keepdim=True)
        assert pairwise_variance(*sums(g)) == pytest.approx(1 - float(g[0] @ g[1]), rel=1e-12)


@pytest.mark.parametrize(("name", "gradients", "m", "c", "phi", "noise"), GOLDEN, ids=[row[0] for row in GOLDEN])
def test_golden_table(name: str, gradients: list[list[float]], m: float, c: float, phi: float, noise: float) -> None:
    s2, g2, n = sums(gradients)
    assert micro_moments(s2, g2, n) == (pytest.approx(m), pytest.approx(c, abs=1e-12))
    assert pairwise_variance(s2, g2, n) == pytest.approx(phi, abs=1e-12)
    if c != 0:  # c = 0 but for rounding is either side of infinity
        assert noise_scale(s2, g2, n, 4) == pytest.approx(noise, abs=1e-9)


def test_no_gradient_at_all_is_undefined() -> None:
    assert math.isnan(pairwise_variance(0.0, 0.0, 4))
    assert math.isnan(noise_scale(0.0, 0.0, 4, 2))


def test_micro_gradients_that_cancel_have_an_infinite_noise_scale() -> None:
    assert noise_scale(4.0, 0.0, 4, 2) == math.inf
    assert noise_scale(4.0, 0.25, 4, 2) == math.inf, "c = 0 exactly"


@pytest.mark.parametrize("n", [0, 1])
def test_one_micro_batch_cannot_be_measured(n: int) -> None:
    for formula in (micro_moments, pairwise_variance):
        with pytest.raises(ValueError, match=f"at least 2 micro-batches an update, got n = {n}"):
            formula(1.0, 1.0, n)
    with pytest.raises(ValueError, match="at least 2"):
        noise_scale(1.0, 1.0, n, 4)


@pytest.mark.parametrize("scale", [1e-12, 3.0, 2.0**32])
def test_a_loss_scale_changes_nothing(scale: float) -> None:
    s2, g2, n = sums(random_gradients(6, 0, 1.0))
    assert pairwise_variance(s2 * scale, g2 * scale, n) == pytest.approx(pairwise_variance(s2, g2, n), rel=1e-12)
    assert noise_scale(s2 * scale, g2 * scale, n, 4) == pytest.approx(noise_scale(s2, g2, n, 4), rel=1e-12)


def test_the_noise_scale_counts_images() -> None:
    s2, g2, n = sums(random_gradients(6, 0, 2.0))
    assert noise_scale(s2, g2, n, 8) == pytest.approx(8 * noise_scale(s2, g2, n, 1), rel=1e-12)


def test_rounding_does_not_leave_the_range() -> None:
    assert pairwise_variance(4.0, 1.0 + 1e-15, 4) == 0.0
    assert pairwise_variance(2.0, -1e-16, 2) == 2.0


@pytest.mark.parametrize(
    ("anchor", "module", "expected"),
    [
        (0.5, 0.5, 1.0),
        (0.4, 0.1, 2.0),
        (0.1, 0.15, math.sqrt(2 / 3)),
        (0.1, 1.0, SQRT_HALF),
        (1.0, 0.01, math.sqrt(10)),
        (0.0, 0.0, 1.0),
        (0.5, 0.0, math.sqrt(10)),
        (0.0, 0.5, SQRT_HALF),
    ],
)
def test_variance_ratio(anchor: float, module: float, expected: float) -> None:
    """The bounds hold before the square root: 0.5 and 10 become 0.7071 and 3.1623."""
    assert variance_ratio(anchor, module, 1e-12, (0.5, 10.0)) == pytest.approx(expected, rel=1e-10)


def test_eps_is_added_to_both_variances() -> None:
    assert variance_ratio(0.3, 0.1, 0.1, (0.1, 10.0)) == pytest.approx(math.sqrt(2))


def test_the_anchors_own_ratio_is_exactly_one() -> None:
    assert all(variance_ratio(phi, phi, 1e-6, (0.5, 10.0)) == 1.0 for phi in (0.0, 1 / 3, 0.7, 2.0))


def test_moving_average() -> None:
    assert moving_average(1.0, 2.0, 0.9) == pytest.approx(1.1)
    assert moving_average(3.0, 2.0, 0.0) == 2.0
    assert moving_average(3.0, 2.0, 1.0) == 3.0


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.9, 0.97, 0.999, 1.0])
@pytest.mark.parametrize("mu", [1.0, 1 / 3, 1.1, SQRT_HALF, 3.1622776601683795])
def test_a_ratio_that_equals_the_scale_factor_leaves_it_exactly(mu: float, decay: float) -> None:
    assert moving_average(mu, mu, decay) == mu


@pytest.mark.parametrize(
    ("ab", "aa", "bb", "phi"),
    [
        (1.0, 1.0, 1.0, 0.0),
        (0.0, 1.0, 4.0, 1.0),
        (-2.0, 1.0, 4.0, 2.0),
        (1.0, 1.0, 4.0, 0.5),
        (1 + 1e-12, 1.0, 1.0, 0.0),
    ],
)
def test_split_variance_is_one_minus_the_cosine(ab: float, aa: float, bb: float, phi: float) -> None:
    assert split_variance(ab, aa, bb) == pytest.approx(phi, abs=1e-12)
    assert split_variance(ab * 1e300, aa * 1e300, bb * 1e300) == pytest.approx(phi, abs=1e-12), "a common factor"


@pytest.mark.parametrize(("aa", "bb"), [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)])
def test_split_variance_of_a_half_without_gradient_is_undefined(aa: float, bb: float) -> None:
    assert math.isnan(split_variance(0.0, aa, bb))


def test_pairwise_variance_without_micro_gradients_is_undefined_whatever_the_average_says() -> None:
    """Under ZeRO-3 the averaged gradient of a module that has none now may be an earlier update's."""
    assert math.isnan(pairwise_variance(0.0, 3.0, 4))
