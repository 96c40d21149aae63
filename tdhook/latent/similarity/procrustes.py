"""Orthogonal Procrustes: how near two representations come by a rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from .samples import Measure, normalised


def procrustes(x: Tensor, y: Tensor) -> Tensor:
    """How alike two representations are after the best rotation (or reflection), centred and of norm 1.

        S = max over orthogonal Q of <X, Y Q> = |X^T Y|_*,    the sum of singular values

    A narrower representation is filled up with zeros. 1 - S^2 is the disparity of `scipy.spatial.procrustes`, which scales one
    of the two as well.

    Args:
        x: Tensor [*lead, N, D1].
        y: Tensor [*lead, N, D2], of the same examples.

    Returns:
        Tensor [*lead], from 0 to 1; NaN where a representation is constant to rounding. Half types give float32. Independent
        data give more than 0, and close to 1 where there are more features than examples.

    Raises:
        InputError: as `cka`.

    Cost: N D1 D2 multiplications and the singular values of a matrix D1 x D2, or N x N where that is smaller.

    Source: Schönemann, "A generalized solution of the orthogonal Procrustes problem" (1966); for representations Ding,
    Denain, Steinhardt, "Grounding Representation Similarity Through Statistical Testing" (2021).

    Examples:
        >>> x = torch.randn(100, 3)
        >>> rotation = torch.linalg.qr(torch.randn(3, 3))[0]
        >>> torch.allclose(procrustes(x, 2 * x @ rotation - 1), torch.tensor(1.0))
        True
    """
    return procrustes_measure()(x, y)


def procrustes_distance(x: Tensor, y: Tensor) -> Tensor:
    """The distance that is left after the best rotation (or reflection), centred and of norm 1: a metric.

        d = min over orthogonal Q of |X - Y Q|_F = sqrt(2 - 2 |X^T Y|_*)

    Args:
        x: as `procrustes`.
        y: as `procrustes`.

    Returns:
        Tensor [*lead], from 0 to sqrt(2); NaN where a representation is constant. Below about 1e-3 a float32 one is rounding.
        Ding et al. (2021) report its square.

    Raises:
        InputError: as `cka`.

    Cost: as `procrustes`.

    Source: Williams et al., "Generalized Shape Metrics on Neural Representations" (2021).

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> procrustes_distance(x, x.flip(0)), procrustes_distance(x, torch.randn(2, 5)) < 1e-3
        (tensor(0.), tensor(True))
    """
    return procrustes_distance_measure()(x, y)


def procrustes_measure() -> Measure:
    """The parts of `procrustes`."""
    return Measure(_prepared, _nuclear)


def procrustes_distance_measure() -> Measure:
    """The parts of `procrustes_distance`."""
    return Measure(_prepared, lambda first, second: (2 - 2 * _nuclear(first, second)).clamp(min=0).sqrt())


def _prepared(x: Tensor) -> Tensor:
    """Centred, of norm 1, and rotated into N dimensions where there are more."""
    x = normalised(x)
    return torch.linalg.qr(x.mT, mode="r")[1].mT if x.shape[-1] > x.shape[-2] else x


def _nuclear(first: Tensor, second: Tensor) -> Tensor:
    product = first.mT @ second
    valid = product.isfinite().all(-1).all(-1)
    values = torch.linalg.svdvals(torch.where(valid[..., None, None], product, 0)).sum(-1)  # a decomposition of NaN raises
    return torch.where(valid, values.clamp(0, 1), torch.nan)
