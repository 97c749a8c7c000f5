"""A run against the dense reference: the largest differences over all updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from tests.engines import ROWS, Record
from tests.reference import Reference


@dataclass(frozen=True)
class Expected:
    """What the reference has after one update."""

    scale_factors: dict[str, float]
    variances: dict[str, float]
    noise_scales: dict[str, float]
    parameters: dict[str, torch.Tensor]


def expected_of(reference: Reference, updates: int, rates: Sequence[float] = (), first: int = 0) -> list[Expected]:
    """Train the reference for ``updates`` updates from ``first`` on, with the learning rates that ``rates`` gives."""
    result = []
    for t in range(first, first + updates):
        reference.options["lr"] = rates[t - first] if rates else reference.options["lr"]
        reference.update(t)
        values = {name: p.detach().clone() for name, p in reference.model.named_parameters()}
        result.append(Expected(dict(reference.mu), dict(reference.phi), dict(reference.noise), values))
    return result


@dataclass
class Worst:
    """The largest differences of a run from its reference: absolute; of noise scales, see ``noise_gap``."""

    scale_factors: float = 0.0
    variances: float = 0.0
    noise_scales: float = 0.0
    parameters: float = 0.0

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.1e}" for name, value in vars(self).items())

    def within(self, allowed: Worst) -> bool:
        """Whether no difference is larger than allowed."""
        return all(value <= vars(allowed)[name] for name, value in vars(self).items())


def compare(records: Sequence[Record], expected: Sequence[Expected]) -> Worst:
    """Compare all updates."""
    found = Worst()
    for seen, right in zip(records, expected, strict=True):
        found.scale_factors = max(found.scale_factors, farthest(seen.scale_factors, right.scale_factors, gap))
        found.variances = max(found.variances, farthest(seen.variances, right.variances, gap))
        found.noise_scales = max(found.noise_scales, farthest(seen.noise_scales, right.noise_scales, noise_gap))
        moved = [(seen.parameters[name] - value).abs().max().item() for name, value in right.parameters.items()]
        found.parameters = max(found.parameters, *moved)
    return found


Gap = Callable[[float, float], float]


def farthest(seen: Mapping[str, float], right: Mapping[str, float], gap: Gap) -> float:
    """The largest difference by module; the modules must be the same."""
    assert seen.keys() == right.keys()
    return max(gap(seen[name], right[name]) for name in right)


def gap(seen: float, right: float) -> float:
    """Absolute difference; infinite when one is undefined and the other is not."""
    if math.isnan(seen) or math.isnan(right):
        return 0.0 if math.isnan(seen) and math.isnan(right) else math.inf
    return abs(seen - right)


def noise_gap(seen: float, right: float) -> float:
    """Difference of b / (b + B) = c / m, the share in which micro-gradients agree: that is what rounding perturbs.

    B = b (m - c) / c itself has m / c times fewer digits: where the micro-gradients hardly agree c is near 0, and B
    thousands of images or, when c <= 0, infinite.
    """
    return gap(ROWS / (ROWS + seen), ROWS / (ROWS + right))


FIGURE = Worst(1e-5, 1e-5, 1e-5, 1e-5)
"""fp32 against float64 over some updates: some 100 roundings of fp32."""

U = 2.0**-8
"""Relative rounding error of bf16, which keeps 8 bits of a number."""

FIGURE_BF16 = Worst(2 * U, 4 * U, 4 * U, 0.16 * 4 * U)
"""bf16 against float64, from weights that bf16 can hold, without weight decay; U = 2^-8.

A gradient passes four layers, the accumulation and the reduction, each rounding to bf16: relative errors of up to 4 U, say.
That is the bound of 1 - cos, and of the micro-gradients' share of agreement (measured: 2.5 U). A ratio is off by half the
sum of its variances' relative errors, 12 U with variances of at least 0.2, and enters the scale factor with weight 0.1 in
each of three measures: 2 U is asked (measured: 0.7 U). Parameters travel 0.16 at most: 4 U of that is asked (measured:
1.6 U). A wrong formula moves a variance by 0.1 and more.
"""

FIGURE_BF16_ADAM = Worst(2 * U, 16 * U, 8 * U, 4 * 0.003)
"""The same of the preconditioned gradient: 1 / (sqrt(v) + eps) magnifies the elements that are all rounding (measured: 14 U
in a variance, 6.6 U in agreement). AdamW steps such an element its whole rate, 0.003, one way or the other: four steps.
"""

V = 2.0**-11
"""Relative rounding error of fp16, which keeps 11 bits."""

FIGURE_FP16 = Worst(2 * V, 8 * V, 4 * V, 0.16 * 6 * V)
"""As for bf16, but for the variances. Measured: 1 V in scale factors, 5 V in variances (split, stage 1, which adds up
micro-gradients in fp16), 2 V in agreement, 0.16 x 3.4 V in parameters."""

FIGURE_FP16_ADAM = Worst(8 * V, 128 * V, 64 * V, 0.003 / 4)
"""Measured: 4.5 V, 66 V, 35 V, and 2.2e-4 in parameters: elements that are all rounding are rarer than in bf16."""
