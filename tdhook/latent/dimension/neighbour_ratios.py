"""The dimension around each point, from the distances to its k nearest neighbours."""

from __future__ import annotations

import math
from typing import Any

from ...core.checks import require_positive
from ...core.errors import InputError
from .estimates import Dimension, Distinct, of_sites, require_enough

AVERAGES = ("mean", "harmonic")


@of_sites(0)
def levina_bickel(
    x: Any, *, k: int = 20, average: str = "harmonic", unbiased: bool = True, chunk_size: int | None = None
) -> Dimension:
    """The maximum likelihood estimate of Levina and Bickel.

        1 / d_i = 1 / (k - 2) sum_j<k log(T_ik / T_ij)                   T_ij: distance from i to its j-th neighbour
        mean:      d = mean_i d_i                                        Levina and Bickel
        harmonic:  1 / d = mean_i 1 / (k - 1) sum_j<k log(T_ik / T_ij)   MacKay and Ghahramani

    Args:
        x: Tensor [*lead, N, D], floating-point; each of `lead` is a set of points of its own. Or a mapping from sites to such
            tensors. Copies of a point count once.
        k: number of neighbours, at least 2 (3 where unbiased).
        average: `"harmonic"`, the likelihood of all neighbourhoods together, or `"mean"`.
        unbiased: of the dimension around each point, and so of their mean: k - 2. False: the k - 1 of the largest likelihood.
            The harmonic mean is the same for both.
        chunk_size: number of points compared at once with the others; see `core.neighbours.nearest`.

    Returns:
        Dimension: value [*lead], local [*lead, N]; the standard error is NaN, as neighbourhoods overlap. NaN with fewer than
        k + 1 distinct points. Infinite around a point whose neighbours are all at the same distance.

    Raises:
        InputError: fewer than k + 1 points, values that are not finite, an unknown average.

    Cost: one search for neighbours (N^2 D multiplications), two under vmap, compilation, or where there are copies.

    Source: Levina, Bickel, "Maximum Likelihood Estimation of Intrinsic Dimension" (2004); MacKay, Ghahramani, "Comments on
    'Maximum Likelihood Estimation of Intrinsic Dimension'" (2005).

    Examples:
        >>> result = levina_bickel(torch.rand(2000, 2) @ torch.randn(2, 50))
        >>> result.value.round(), result.local.shape
        (tensor(2.), torch.Size([2000]))
    """
    require_positive("chunk_size", chunk_size, optional=True)
    require_positive("k", k, least=3 if unbiased else 2)
    if average not in AVERAGES:
        raise InputError(f"average={average!r} is unknown; choose 'harmonic' or 'mean'.")
    require_enough(x, k, f"levina_bickel with k={k}")
    found = Distinct.of(x, k, chunk_size)
    logs = found.distances.log()
    total = (logs[..., -1:] - logs[..., :-1]).sum(-1)
    local = (k - 1 - int(unbiased)) / total
    return found.dimension((k - 1) / found.mean(total) if average == "harmonic" else found.mean(local), local)


@of_sites(0)
def local_knn(x: Any, *, k: int = 10, average: str = "harmonic", chunk_size: int | None = None) -> Dimension:
    """The dimension from the distances at which a neighbourhood doubles.

        d_i = log 2 / log(R_i,2k / R_i,k)           R_ij: distance from i to its j-th neighbour
        harmonic:  1 / d = mean_i log(R_i,2k / R_i,k) / log 2
        mean:      d = mean_i min(d_i, D)

    It is below the dimension for a small k, by the factor 1 / (1 + 1 / (4 k log 2)) in the harmonic mean.

    Args:
        x: Tensor [*lead, N, D], floating-point; each of `lead` is a set of points of its own. Or a mapping from sites to such
            tensors. Copies of a point count once.
        k: half the number of neighbours.
        average: `"harmonic"`, or the `"mean"` of the paper, which a few points with neighbours at almost the same distance
            carry away.
        chunk_size: number of points compared at once with the others; see `core.neighbours.nearest`.

    Returns:
        Dimension: value [*lead], local [*lead, N]; the standard error is NaN. NaN with fewer than 2 k + 1 distinct points.
        Infinite around a point whose neighbours k to 2 k are all at the same distance.

    Raises:
        InputError: fewer than 2 k + 1 points, values that are not finite, an unknown average.

    Cost: one search for neighbours (N^2 D multiplications), two under vmap, compilation, or where there are copies.

    Source: Farahmand, Szepesvari, Audibert, "Manifold-Adaptive Dimension Estimation" (2007).

    Examples:
        >>> local_knn(torch.rand(2000, 2) @ torch.randn(2, 50)).value.round()
        tensor(2.)
    """
    require_positive("chunk_size", chunk_size, optional=True)
    require_positive("k", k)
    if average not in AVERAGES:
        raise InputError(f"average={average!r} is unknown; choose 'mean' or 'harmonic'.")
    require_enough(x, 2 * k, f"local_knn with k={k}")
    found = Distinct.of(x, 2 * k, chunk_size)
    doublings = (found.distances[..., -1].log() - found.distances[..., k - 1].log()) / math.log(2)
    local = 1 / doublings
    return found.dimension(
        1 / found.mean(doublings) if average == "harmonic" else found.mean(local.clamp(max=x.shape[-1])), local
    )
