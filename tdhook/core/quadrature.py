"""Quadrature rules on [0, 1]."""

from __future__ import annotations

import functools

import numpy
import torch

from .checks import require_positive
from .errors import InputError

QUADRATURES = ("gauss_legendre", "riemann_left", "riemann_right", "midpoint", "trapezoid")


def quadrature_rule(name: str, steps: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Nodes in [0, 1] and weights that sum to one, in double precision.

    Args:
        name: `"gauss_legendre"` (exact for polynomials of degree 2 * steps - 1), `"riemann_left"`, `"riemann_right"`,
            `"midpoint"` or `"trapezoid"` (steps nodes including both ends, the end weights halved).
        steps: number of nodes; at least 2 for the trapezoid.

    Raises:
        InputError: an unknown name, too few steps.

    Examples:
        >>> quadrature_rule("trapezoid", 3)
        ((0.0, 0.5, 1.0), (0.25, 0.5, 0.25))
    """
    if name not in QUADRATURES:
        raise InputError(f"quadrature={name!r} is unknown; choose from {', '.join(QUADRATURES)}.")
    require_positive("steps", steps, least=2 if name == "trapezoid" else 1)
    return _rule(name, steps)


@torch.compiler.assume_constant_result
def _rule(name: str, n: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return _computed_rule(name, n)


@functools.lru_cache(maxsize=64)
def _computed_rule(name: str, n: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if name == "gauss_legendre":
        nodes, weights = numpy.polynomial.legendre.leggauss(n)
        return tuple(((nodes + 1) / 2).tolist()), tuple((weights / 2).tolist())
    if name == "trapezoid":
        ends = {0, n - 1}
        return tuple(i / (n - 1) for i in range(n)), tuple((0.5 if i in ends else 1.0) / (n - 1) for i in range(n))
    shift = {"riemann_left": 0.0, "riemann_right": 1.0, "midpoint": 0.5}[name]
    return tuple((i + shift) / n for i in range(n)), (1 / n,) * n
