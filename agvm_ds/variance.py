"""The formulas of AGVM, as pure functions on numbers: no tensors, no ranks.

Symbols, for one module in one measured update (names follow the AGVM paper, arXiv 2210.11078, section 3):

    n     micro-batches in the update: data-parallel ranks x gradient accumulation steps
    g_k   the gradient of micro-batch k's mean loss, k = 1..n            G = mean of the g_k
    S2    sum over k of |g_k|^2                                          G2 = |G|^2
    Phi   gradient variance: 1 - cos of the gradients of two halves of the batch, in [0, 2]
    mu    scale factor: what multiplies the module's learning rate

S2 and G2 may carry a common factor (a squared loss scale): every result here is a ratio of them and does not see it.
"""

from __future__ import annotations

import math

UNDEFINED = math.nan


def micro_moments(s2: float, g2: float, n: int) -> tuple[float, float]:
    """Mean squared norm m of a micro-gradient, and mean inner product c of two different ones.

    m = S2 / n;  c = (n^2 G2 - S2) / (n (n - 1)), because n^2 G2 = S2 + the sum over all ordered pairs. Needs n >= 2.
    """
    if n < 2:
        raise ValueError(f"gradient variance needs at least 2 micro-batches an update, got n = {n}")
    return s2 / n, (n * n * g2 - s2) / (n * (n - 1))


def pairwise_variance(s2: float, g2: float, n: int) -> float:
    """Phi as a ratio of expectations over all splits of the n micro-batches into two halves.

    Phi = 1 - c / ((2/n) m + (1 - 2/n) c): numerator and denominator are the means, over the splits, of <G_A, G_B> and
    |G_A|^2 for halves of n/2. Clamped to [0, 2], where it lies but for rounding; UNDEFINED when every g_k is zero.
    """
    m, c = micro_moments(s2, g2, n)
    half_square = (2 / n) * m + (1 - 2 / n) * c
    if not (m > 0 and half_square > 0):
        return UNDEFINED
    return _clamped(1 - c / half_square)


def split_variance(ab: float, aa: float, bb: float) -> float:
    """Phi = 1 - cos(G_A, G_B) from <G_A, G_B>, |G_A|^2 and |G_B|^2 (AGVM paper, section 3.2).

    Clamped to [0, 2]; UNDEFINED when one of the halves is zero. A common factor of all three has no effect.
    """
    if not (aa > 0 and bb > 0):
        return UNDEFINED
    return _clamped(1 - ab / (math.sqrt(aa) * math.sqrt(bb)))


def _clamped(phi: float) -> float:
    """Phi lies in [0, 2] but for rounding."""
    return min(max(phi, 0.0), 2.0)


def noise_and_signal(s2: float, g2: float, n: int, images: int) -> tuple[float, float]:
    """images (m - c) and c: unbiased estimates of the trace of one image's gradient covariance, and of |true gradient|^2.

    ``images``: images in a micro-batch. Means of each over many updates give a noise scale with less error than the mean of
    their ratios (McCandlish et al., 2018, appendix A.1). c may come out below 0.
    """
    m, c = micro_moments(s2, g2, n)
    return images * (m - c), c


def noise_scale(s2: float, g2: float, n: int, images: int) -> float:
    """The gradient noise scale B = images (m - c) / c, in images: the critical batch size (McCandlish et al., 2018).

    ``images``: images in a micro-batch. Infinite when c <= 0, UNDEFINED when every g_k is zero.
    """
    noise, signal = noise_and_signal(s2, g2, n, images)
    if s2 == 0:
        return UNDEFINED
    return noise / signal if signal > 0 else math.inf


def variance_ratio(anchor: float, module: float, eps: float, bounds: tuple[float, float]) -> float:
    """r = sqrt(clamp((Phi_0 + eps) / (Phi_i + eps), low, high)), with Phi_0 the anchor's (AGVM paper, section 3.2)."""
    low, high = bounds
    return math.sqrt(min(max((anchor + eps) / (module + eps), low), high))


def moving_average(mu: float, ratio: float, decay: float) -> float:
    """mu <- decay mu + (1 - decay) r, written so that r = mu leaves mu exactly as it is.

    It lies between mu and r, and is put there when rounding leaves it outside: scale factors do not creep over a bound.
    """
    low, high = min(mu, ratio), max(mu, ratio)
    return min(max(mu + (1 - decay) * (ratio - mu), low), high)


def factor_bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    """Where every scale factor lies that began at 1 and followed bounded ratios: [sqrt(low), sqrt(high)]."""
    low, high = bounds
    return math.sqrt(low), math.sqrt(high)
