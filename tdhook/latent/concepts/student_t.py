"""The distribution of Student's t, which torch lacks."""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 300
TINY = 1e-300


def two_sided(statistic: Tensor, degrees: Tensor) -> Tensor:
    """The probability of a t at least as far from zero, as Tensor in float64.

        p = I_x(degrees / 2, 1 / 2),    x = degrees / (degrees + t^2)

    Args:
        statistic: t.
        degrees: degrees of freedom, of the same shape.
    """
    t, n = statistic.double(), degrees.double()
    finite = t.isfinite()
    square = torch.where(finite, t, torch.zeros_like(t)).square()
    p = incomplete_beta(n / 2, torch.full_like(n, 0.5), n / (n + square), square / (n + square))
    return torch.where(finite, p, torch.where(t.isnan(), t, torch.zeros_like(t)))


def incomplete_beta(a: Tensor, b: Tensor, x: Tensor, rest: Tensor) -> Tensor:
    """The regularised incomplete beta function I_x(a, b), with `rest` = 1 - x.

    The continued fraction of DLMF 8.17.22 by the modified method of Lentz, on the side of the mean where it converges fast:
    I_x(a, b) = 1 - I_{1-x}(b, a).
    """
    swapped = x > (a + 1) / (a + b + 2)
    first, second = torch.where(swapped, b, a), torch.where(swapped, a, b)
    x, rest = torch.where(swapped, rest, x), torch.where(swapped, x, rest)
    factor = first * x.clamp_min(TINY).log() + second * rest.clamp_min(TINY).log()
    factor = factor + torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
    part = factor.exp() / first * _fraction(first, second, x)
    part = torch.where(x == 0, torch.zeros_like(part), part)
    return torch.where(swapped, 1 - part, part)


def _fraction(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    c = torch.ones_like(x)
    d = 1 / _away_from_zero(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, ITERATIONS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / _away_from_zero(1 + term * d)
            c = _away_from_zero(1 + term / c)
            value = value * c * d
    return value


def _away_from_zero(x: Tensor) -> Tensor:
    return torch.where(x.abs() < TINY, torch.full_like(x, TINY), x)
