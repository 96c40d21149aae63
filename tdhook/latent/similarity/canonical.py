"""Canonical correlations: CCA, SVCCA and PWCCA, which do not change under invertible linear maps of the features."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.checks import require_number
from ...core.errors import InputError
from ...core.structure import describe
from .samples import Measure, normalised


class Basis(NamedTuple):
    """A representation X = U S V^T, whitened.

    Attributes:
        directions: Tensor [*lead, N, R]: U, shrunk by regularisation; 0 in what is left out.
        loadings: Tensor [*lead, R, D]: directions^T X.
        kept: Tensor [*lead]: how many directions are not left out.
    """

    directions: Tensor
    loadings: Tensor
    kept: Tensor


def canonical_correlations(x: Tensor, y: Tensor, *, regularization: float = 0.0) -> Tensor:
    """The correlations of the best aligned pairs of directions, best first.

        rho_i = max corr(X a_i, Y b_i),   X a_i uncorrelated with X a_1 .. X a_i-1, and Y b_i likewise
              = the singular values of (Cxx + l_x I)^-1/2 Cxy (Cyy + l_y I)^-1/2

    Args:
        x: Tensor [*lead, N, D1].
        y: Tensor [*lead, N, D2], of the same examples.
        regularization: r in l_x = r * trace(Cxx) / D1, and likewise for y: a share of the mean variance. 0: directions without
            variance are left out.

    Returns:
        Tensor [*lead, min(N, D1, D2)], from 0 to 1; NaN where a representation is constant. Half types give float32.

    Raises:
        InputError: as `cka`; a negative `regularization`; without it, fewer than D + 2 examples for D features: then all
            correlations are 1, whatever the data.

    Cost: a singular value decomposition of each representation, and one of a matrix D1 x D2.

    Source: Hotelling, "Relations Between Two Sets of Variates" (1936); for representations Raghu et al., "SVCCA" (2017); with
    a ridge Vinod, "Canonical ridge and econometrics of joint production" (1976).

    Examples:
        >>> x = torch.randn(100, 2)
        >>> y = torch.stack([x[:, 0] + x[:, 1], torch.randn(100)], 1)
        >>> canonical_correlations(x, y)[0]
        tensor(1.0000)
    """
    measure = _measure(regularization, lambda first, second: _correlations(first, second).clamp(0, 1))
    return measure(x, y)


def cca(x: Tensor, y: Tensor, *, regularization: float = 0.0) -> Tensor:
    """The mean of the canonical correlations: which share of directions two representations have in common.

        CCA = 1/R sum_i rho_i,    R the smaller of the ranks

    The mean of their squares (R^2_CCA) is `canonical_correlations(x, y).square().mean(-1)` for full ranks.

    Args:
        x: as `canonical_correlations`.
        y: as `canonical_correlations`.
        regularization: as `canonical_correlations`.

    Returns:
        Tensor [*lead], from 0 to 1; NaN where a representation is constant. Independent data give more than 0: with D features
        each, about sqrt(D / N).

    Raises:
        InputError: as `canonical_correlations`.

    Cost: as `canonical_correlations`.

    Source: Raghu et al. (2017); Kornblith et al. (2019).

    Examples:
        >>> x = torch.randn(100, 3)
        >>> torch.allclose(cca(x, x @ torch.randn(3, 3)), torch.tensor(1.0), atol=1e-4)
        True
    """
    return cca_measure(regularization)(x, y)


def svcca(x: Tensor, y: Tensor, *, variance: float = 0.99) -> Tensor:
    """The mean canonical correlation of the leading principal directions.

        SVCCA = CCA(U_x, U_y),   the fewest singular directions that keep a share of the variance, of each

    Args:
        x: as `canonical_correlations`.
        y: as `canonical_correlations`.
        variance: the share of the variance that is kept, at most 1.

    Returns:
        Tensor [*lead], from 0 to 1; NaN where a representation is constant.

    Raises:
        InputError: as `cka`; a variance that is not in (0, 1].

    Cost: as `canonical_correlations`.

    Source: Raghu et al., "SVCCA: Singular Vector Canonical Correlation Analysis for Deep Learning Dynamics and
    Interpretability" (2017).

    Examples:
        >>> x = torch.randn(100, 3)
        >>> noisy = torch.cat([x, 1e-3 * torch.randn(100, 5)], 1)
        >>> svcca(x, noisy) > 0.99, cca(x, noisy) > 0.99, svcca(noisy, torch.randn(100, 3)) < 0.5
        (tensor(True), tensor(True), tensor(True))
    """
    return svcca_measure(variance)(x, y)


def pwcca(x: Tensor, y: Tensor, *, regularization: float = 0.0) -> Tensor:
    """Canonical correlations weighted by how much of the first representation each direction accounts for.

        PWCCA = sum_i alpha_i rho_i / sum_i alpha_i,   alpha_i = sum_j |<h_i, x_j>|,   h_i = X a_i

    Args:
        x: Tensor [*lead, N, D1]: the one whose features x_j give the weights, so that the order matters.
        y: Tensor [*lead, N, D2].
        regularization: as `canonical_correlations`.

    Returns:
        Tensor [*lead], from 0 to 1; NaN where a representation is constant.

    Raises:
        InputError: as `canonical_correlations`.

    Cost: as `canonical_correlations`.

    Source: Morcos, Raghu, Bengio, "Insights on representational similarity in neural networks with canonical correlation"
    (2018).

    Examples:
        >>> x = torch.randn(100, 2) * torch.tensor([10.0, 1.0])
        >>> y = torch.cat([x[:, :1], torch.randn(100, 1)], 1)
        >>> pwcca(x, y) > cca(x, y)
        tensor(True)
    """
    return pwcca_measure(regularization)(x, y)


def cca_measure(regularization: float = 0.0) -> Measure:
    """The parts of `cca`."""
    return _measure(regularization, _mean)


def svcca_measure(variance: float = 0.99) -> Measure:
    """The parts of `svcca`."""
    require_number("variance", variance, strict=True)
    if variance > 1:
        raise InputError(f"variance is the share that is kept, above 0 and at most 1, got {describe(variance)}.")
    return Measure(lambda x: _whitened(x, 0.0, variance), _mean)


def pwcca_measure(regularization: float = 0.0) -> Measure:
    """The parts of `pwcca`."""
    return _measure(regularization, _projection_weighted, symmetric=False)


def _measure(regularization: float, between: Any, symmetric: bool = True) -> Measure:
    require_number("regularization", regularization)

    def require(name: str, x: Tensor) -> None:
        if regularization == 0 and x.shape[-2] < x.shape[-1] + 2:
            raise InputError(
                f"{name} has {x.shape[-2]} examples of {x.shape[-1]} features: every canonical correlation would be 1, "
                "whatever the data; give more examples, regularization=0.1 (say), or use svcca."
            )

    return Measure(lambda x: _whitened(x, regularization, 1.0), between, symmetric=symmetric, require=require)


def _whitened(x: Tensor, regularization: float, variance: float) -> Basis:
    data = normalised(x)
    # a decomposition of NaN raises; what is NaN shows in the count
    valid = data.isfinite().all(-1).all(-1)
    left, singular, right = torch.linalg.svd(torch.where(valid[..., None, None], data, 0), full_matrices=False)
    shares = singular.square()  # they sum to 1, or to 0
    floor = torch.finfo(x.dtype).eps * max(x.shape[-2:])
    kept = singular > floor * singular[..., :1]
    if variance < 1:  # the first of them is always kept
        kept = kept & (shares.cumsum(-1) - shares < variance * shares.sum(-1, keepdim=True))
    whitened = singular / (shares + regularization / x.shape[-1]).clamp(min=torch.finfo(x.dtype).tiny).sqrt()
    factors = torch.where(kept, whitened, 0)
    loadings = (factors * singular)[..., None] * right
    return Basis(left * factors[..., None, :], loadings, torch.where(valid, kept.sum(-1).to(x.dtype), torch.nan))


def _correlations(first: Basis, second: Basis) -> Tensor:
    values = torch.linalg.svdvals(first.directions.mT @ second.directions)
    return values + 0 * (first.kept + second.kept)[..., None]


def _mean(first: Basis, second: Basis) -> Tensor:
    return _correlations(first, second).clamp(0, 1).sum(-1) / torch.minimum(first.kept, second.kept)


def _projection_weighted(first: Basis, second: Basis) -> Tensor:
    left, values, _ = torch.linalg.svd(first.directions.mT @ second.directions, full_matrices=False)
    weights = (left.mT @ first.loadings).abs().sum(-1)
    # of directions beyond the ranks, any basis may come
    within = torch.arange(values.shape[-1], device=values.device) < torch.minimum(first.kept, second.kept)[..., None]
    weights = torch.where(within, weights, 0)
    return (weights * values.clamp(0, 1)).sum(-1) / weights.sum(-1) + 0 * (first.kept + second.kept)
