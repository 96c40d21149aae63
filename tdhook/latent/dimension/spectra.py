"""The dimension around each point, and of all, from the eigenvalues of covariances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.batching import chunks
from ...core.checks import require_number, require_positive
from ...core.errors import InputError
from ...core.neighbours import BLOCK, magnitude
from .estimates import Dimension, Distinct, of_sites, require_enough

CRITERIA = ("ratio", "gap")


@of_sites(0)
def local_pca(
    x: Any, *, k: int = 20, criterion: str = "ratio", alpha: float = 0.05, chunk_size: int | None = None
) -> Dimension:
    """The number of large eigenvalues of the covariance of each point and its k nearest neighbours.

        ratio:  d_i = #{j: lambda_j > alpha lambda_1}
        gap:    d_i = argmax_j lambda_j / lambda_j+1         over j < min(k, D)

    k + 1 points span min(k, D) directions: the fall from the last of them to nothing says nothing about the data, and is no
    gap here. So `gap` never finds the full min(k, D) dimensions; `ratio` does. A curved surface within a subspace, and without
    noise, has its largest gap at the dimension of the subspace.

    Args:
        x: Tensor [*lead, N, D], floating-point; each of `lead` is a set of points of its own. Or a mapping from sites to such
            tensors. Copies of a point count once.
        k: number of neighbours: several times the dimension that is expected, and few enough that they lie in a plane.
        criterion: `"ratio"` or `"gap"`.
        alpha: for `"ratio"`: the share of the largest eigenvalue that an eigenvalue has to be above.
        chunk_size: number of points compared at once with the others; see `core.neighbours.nearest`.

    Returns:
        Dimension: value [*lead], the mean of local [*lead, N], whole numbers from 1 to min(k, D); the standard error is NaN.
        NaN with fewer than k + 1 distinct points.

    Raises:
        InputError: fewer than k + 1 points, values that are not finite, an unknown criterion, a bad `alpha`.

    Cost: one search for neighbours (N^2 D multiplications; two under vmap, compilation, or where there are copies), and N
        eigenvalue problems of min(k + 1, D) dimensions.

    Source: Fukunaga, Olsen, "An Algorithm for Finding Intrinsic Dimensionality of Data" (1971); gap: Bruske, Sommer,
    "Intrinsic Dimensionality Estimation with Optimally Topology Preserving Maps" (1998).

    Examples:
        >>> local_pca(torch.rand(500, 2) @ torch.randn(2, 50)).value
        tensor(2.)
    """
    require_positive("chunk_size", chunk_size, optional=True)
    require_positive("k", k)
    if criterion not in CRITERIA:
        raise InputError(f"criterion={criterion!r} is unknown; choose 'ratio' or 'gap'.")
    require_number("alpha", alpha)
    if alpha >= 1:
        raise InputError(f"alpha is a share of the largest eigenvalue below 1, got {alpha}.")
    require_enough(x, k, f"local_pca with k={k}")
    found = Distinct.of(x, k, chunk_size)
    place = torch.arange(x.shape[-2], device=x.device).expand(x.shape[:-1])[..., None]
    values = _eigenvalues(x, torch.cat([place, found.indices], -1), found.distances[..., -1])
    if criterion == "ratio":
        local = (values > alpha * values[..., :1]).sum(-1).clamp(min=1)
    elif values.shape[-1] == 1:
        local = torch.ones_like(values[..., 0])
    else:
        # What rounding made is one level: there is no gap in it.
        floor = values[..., :1] * (torch.finfo(values.dtype).eps * max(k + 1, x.shape[-1])) + torch.finfo(values.dtype).tiny
        values = torch.maximum(values, floor)
        local = (values[..., :-1] / values[..., 1:]).argmax(-1) + 1
    local = local.to(values.dtype)
    return found.dimension(found.mean(local), local)


@of_sites(0)
def ca_pca(x: Any, *, k: int = 20, chunk_size: int | None = None) -> Dimension:
    """Local PCA that expects the eigenvalues of a ball in a curved, not in a flat surface.

        lambda: eigenvalues of the covariance of the k nearest neighbours, divided by r^2, r = (R_k + R_k+1) / 2
        d = argmin_d |1 / (d + 2) - (lambda_1..d + (3 d + 4) / (d (d + 4)) t_d)| + 2 t_d,     t_d = sum_j>d lambda_j

    over d = 1 .. min(k - 1, D), which is as many directions as k points span.

    Args:
        x: Tensor [*lead, N, D], floating-point; each of `lead` is a set of points of its own. Or a mapping from sites to such
            tensors. Copies of a point count once.
        k: number of neighbours, at least 2.
        chunk_size: number of points compared at once with the others; see `core.neighbours.nearest`.

    Returns:
        Dimension: value [*lead], the mean of local [*lead, N], whole numbers from 1 to min(k - 1, D); the standard error is
        NaN. NaN with fewer than k + 2 distinct points.

    Raises:
        InputError: fewer than k + 2 points, values that are not finite.

    Cost: as `local_pca`.

    Source: Gilbert, O'Neill, "CA-PCA: Manifold Dimension Estimation, Adapted for Curvature" (2023).

    Examples:
        >>> circle = torch.randn(500, 2)
        >>> circle = circle / circle.norm(dim=1, keepdim=True) @ torch.randn(2, 50)
        >>> ca_pca(circle).value
        tensor(1.)
    """
    require_positive("chunk_size", chunk_size, optional=True)
    require_positive("k", k, least=2)
    require_enough(x, k + 1, f"ca_pca with k={k}")
    found = Distinct.of(x, k + 1, chunk_size)
    radius = found.distances[..., -2:].mean(-1)
    # float64: sums of squares are taken apart below
    values = _eigenvalues(x, found.indices[..., :-1], radius).to(torch.float64)
    d = torch.arange(1, values.shape[-1] + 1, device=x.device).to(values.dtype)
    tail = values.sum(-1, keepdim=True) - values.cumsum(-1)
    # sum_j<=d (lambda_j + shift_d)^2
    shift = (3 * d + 4) / (d * (d + 4)) * tail - 1 / (d + 2)
    squares = values.square().cumsum(-1) + 2 * shift * values.cumsum(-1) + d * shift.square()
    local = ((squares.clamp(min=0).sqrt() + 2 * tail).argmin(-1) + 1).to(radius.dtype)
    return found.dimension(found.mean(local), local)


@of_sites(0)
def participation_ratio(x: Any) -> Dimension:
    """The number of directions over which the variance is spread.

        PR = (sum_j lambda_j)^2 / sum_j lambda_j^2         lambda: eigenvalues of the covariance of all points

    A linear dimension: of a curved surface it counts the directions that it bends into. It is at most min(N - 1, D), and
    below that of the distribution where N is not much larger than it.

    Args:
        x: Tensor [*lead, N, D], floating-point; each of `lead` is a set of points of its own. Or a mapping from sites to such
            tensors. Every row counts, copies too.

    Returns:
        Dimension: value [*lead]; the standard error is NaN. NaN where all points are the same.

    Raises:
        InputError: fewer than two points, values that are not finite.

    Cost: one matrix product of N * D * min(N, D) multiplications.

    Source: Gao, Ganguli, "On simplicity and complexity in the brave new world of large-scale neuroscience" (2015).

    Examples:
        >>> participation_ratio(torch.eye(5)).value
        tensor(4.)
    """
    require_enough(x, 1, "participation_ratio")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x / magnitude(x)
    same = (x == x[..., :1, :]).all(-1).all(-1)
    x = x - x.mean(-2, keepdim=True)
    x = x / magnitude(x)
    product = x.mT @ x if x.shape[-1] < x.shape[-2] else x @ x.mT
    value = x.square().sum((-2, -1)).square() / product.square().sum((-2, -1))
    value = torch.where(same, torch.nan, value)
    return Dimension(value=value, standard_error=torch.full_like(value, torch.nan), local=None, batch_size=value.shape)  # type: ignore[call-arg]


def _eigenvalues(x: Tensor, indices: Tensor, radius: Tensor) -> Tensor:
    """Eigenvalues [*lead, N, min(m - 1, D)] of the covariances of m points, largest first, over the radius squared.

    Args:
        x: Tensor [*lead, N, D].
        indices: Tensor [*lead, N, m]: of the points whose covariance is taken.
        radius: Tensor [*lead, N].
    """
    count, features, many = x.shape[-2], x.shape[-1], indices.shape[-1]
    x = x.to(radius.dtype)
    scale = magnitude(x)
    points, around = (x / scale).reshape(-1, count, features), indices.reshape(-1, count, many)
    radius = (radius / scale[..., 0]).reshape(-1, count)
    radius = torch.where((radius > 0) & radius.isfinite(), radius, 1)[..., None, None]
    sets = torch.arange(len(points), device=x.device)[:, None, None]
    found = []
    for part in chunks(count, max(1, BLOCK // max(1, len(points) * many * features))):
        # Around the point itself, so that nothing is lost where it is far from 0.
        near = (points[sets, around[:, part]] - points[:, part, None]) / radius[:, part]
        near = near - near.mean(-2, keepdim=True)
        near = torch.where(near.isfinite(), near, 0)  # LAPACK raises for others; they become NaN in the end
        product = near.mT @ near if features < many else near @ near.mT
        found.append(torch.linalg.eigvalsh(product).flip(-1)[..., : min(many - 1, features)] / (many - 1))
    values = torch.cat(found, 1).clamp(min=0)
    return values.reshape(*x.shape[:-1], values.shape[-1])
