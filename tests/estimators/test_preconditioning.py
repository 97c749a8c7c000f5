"""The gradient as an Adam sees it, against the formulas and torch's own step."""

from __future__ import annotations

import torch

from agvm_ds.estimators.preconditioning import inverse_denominator, official_step


def test_the_inverse_denominator_is_adams() -> None:
    v = torch.tensor([0.0, 1e-4, 4.0], dtype=torch.float64)
    torch.testing.assert_close(inverse_denominator(v.clone(), 0.5), 1 / (v.sqrt() + 0.5))


def test_without_eps_and_second_moment_it_is_one() -> None:
    assert inverse_denominator(torch.tensor([0.0, 4.0]), 0.0).tolist() == [1.0, 0.5]


def test_the_official_step_is_adams_own_update_but_for_momentum_and_bias() -> None:
    """With n = 1 it is what torch's Adam does with beta1 = 0: g / (sqrt(beta2 v + (1 - beta2) g^2) + eps)."""
    half, v = torch.tensor([0.3, -2.0, 0.0, 1e-3]).double(), torch.tensor([0.1, 0.0, 0.2, 1e-8]).double()
    denominator = (0.95 * v + 0.05 * half**2).sqrt() + 1e-6
    torch.testing.assert_close(official_step(half, v, 1, 0.95, 1e-6), half / denominator)


def test_n_is_in_the_denominator_alone() -> None:
    half, v = torch.tensor([3.0]).double(), torch.tensor([0.0]).double()
    expected = 3.0 / ((0.05 * (3.0 / 4) ** 2) ** 0.5 + 1e-6)
    torch.testing.assert_close(official_step(half, v, 4, 0.95, 1e-6), torch.tensor([expected]).double())


def test_an_element_without_gradient_is_zero_even_without_eps() -> None:
    zero = torch.zeros(1).double()
    assert official_step(zero, zero, 2, 0.95, 0.0).item() == 0.0
