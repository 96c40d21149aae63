"""The dimension from the two nearest neighbours of each point."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import tensorclass
from torch import Tensor

from ...core.checks import require_number, require_positive
from ...core.errors import InputError
from .estimates import Dimension, Distinct, of_sites, require_enough

METHODS = ("fit", "likelihood")


@tensorclass
class Ratios:
    """The points of the line whose slope is the dimension, smallest ratio first.

    Attributes:
        log_ratios: Tensor [*lead, N]: log(r2 / r1); NaN in place of copies.
        log_survival: Tensor [*lead, N]: -log(1 - i / M) for the i-th of M distinct points; NaN likewise, and for the last.
    """

    log_ratios: Tensor
    log_survival: Tensor


@of_sites(0)
def two_nn(
    x: Any, *, method: str = "fit", discard: float = 0.1, unbiased: bool = True, chunk_size: int | None = None
) -> Dimension:
    """TwoNN: the dimension from the ratio of the distances to the second and the first neighbour.

        mu_i = r_i2 / r_i1,  P(mu <= m) = 1 - m^-d          where the density is constant up to the second neighbour
        fit:         -log(1 - i / M) = d log mu_(i)         least squares through the origin, without the largest ratios
        likelihood:  d = (m - 1) / (sum_i<=m log mu_(i) + (M - m) log mu_(m))

    with M distinct points, of which the m with the smallest ratios are used. `likelihood` counts the others as at least that
    large, so that discarding costs precision but no bias; without any discarded it is the (M - 1) / sum_i log mu_i of Denti.

    Args:
        x: Tensor [*lead, N, D], floating-point; each of `lead` is a set of points of its own. Or a mapping from sites to such
            tensors. Copies of a point count once; near copies (the same token at every start) should be left out before.
        method: `"fit"` (Facco et al.) or `"likelihood"`.
        discard: the share of the largest ratios that is not used, which a changing density or outliers spoil first.
        unbiased: for `"likelihood"`: m - 1, instead of the m of the largest likelihood.
        chunk_size: number of points compared at once with the others; see `core.neighbours.nearest`.

    Returns:
        Dimension: value and standard error [*lead], or a TensorDict of them keyed by site; NaN with fewer than three distinct
        points. The standard error is that of independent ratios, d / sqrt(m - 2), for `"likelihood"`, and NaN for `"fit"`;
        ratios of mutual neighbours are not independent, which adds up to a quarter to it: see `confidence_interval`.

    Raises:
        InputError: fewer than three points, values that are not finite, an unknown method, a bad `discard`.

    Cost: one search for neighbours (N^2 D multiplications), two under vmap, compilation, or where there are copies.

    Source: Facco, d'Errico, Rodriguez, Laio, "Estimating the intrinsic dimension of datasets by a minimal neighborhood
    information" (2017); likelihood: Denti, Doimo, Laio, Mira, "The generalized ratios intrinsic dimension estimator" (2022);
    censored: Epstein, Sobel, "Life Testing" (1953).

    Examples:
        >>> plane = torch.rand(2000, 2) @ torch.randn(2, 50)
        >>> two_nn(plane).value.round()
        tensor(2.)
        >>> result = two_nn(plane, method="likelihood")
        >>> abs(result.value - 2) < 4 * result.standard_error
        tensor(True)
    """
    if method not in METHODS:
        raise InputError(f"method={method!r} is unknown; choose 'fit' or 'likelihood'.")
    _require(x, discard, chunk_size, "two_nn")
    found = Distinct.of(x, 2, chunk_size)
    ratios, rank, count = _sorted(found)
    used = (count * (1 - discard) + 1e-6).floor()
    if method == "fit":
        chosen = rank <= torch.minimum(used, count - 1)
        survival = torch.where(chosen, -torch.log1p(-torch.where(chosen, rank / count, 0)), 0)
        ratios = torch.where(chosen, ratios, 0)
        return found.dimension((ratios * survival).sum(-1) / ratios.square().sum(-1))
    chosen = rank <= used
    largest = torch.where(rank == used, ratios, 0).sum(-1)
    total = torch.where(chosen, ratios, 0).sum(-1) + (count - used)[..., 0] * largest
    used = used[..., 0]
    value = (used - int(unbiased)) / total
    return found.dimension(value, standard_error=torch.where(used > 2, value / (used - 2).clamp(min=1).sqrt(), torch.nan))


@of_sites(0)
def two_nn_ratios(x: Any, *, chunk_size: int | None = None) -> Ratios:
    """What `two_nn` fits: a straight line through the origin, of slope d, where its assumption holds.

    Args:
        x: Tensor [*lead, N, D], or a mapping from sites to such tensors.
        chunk_size: as in `two_nn`.

    Returns:
        Ratios: two tensors [*lead, N], to be drawn one against the other; or a TensorDict of them keyed by site.

    Raises:
        InputError: as `two_nn`.

    Cost: as `two_nn`.

    Examples:
        >>> line = two_nn_ratios(torch.rand(100, 3))
        >>> line.log_ratios.shape, line.log_survival[49]
        (torch.Size([100]), tensor(0.6931))
    """
    _require(x, 0.0, chunk_size, "two_nn_ratios")
    ratios, rank, count = _sorted(Distinct.of(x, 2, chunk_size))
    return Ratios(  # type: ignore[call-arg]
        log_ratios=torch.where(rank <= count, ratios, torch.nan),
        log_survival=torch.where(rank < count, -torch.log1p(-torch.where(rank < count, rank / count, 0)), torch.nan),
        batch_size=ratios.shape[:-1],
    )


def _sorted(found: Distinct) -> tuple[Tensor, Tensor, Tensor]:
    """log mu [*lead, N], smallest first and copies last; the ranks 1 .. N [N]; the number of distinct points [*lead, 1]."""
    first, second = found.distances.unbind(-1)
    ratios = torch.where(found.kept, second.log() - first.log(), torch.inf).sort(-1).values
    rank = torch.arange(1, ratios.shape[-1] + 1, device=ratios.device).to(ratios.dtype)
    return ratios, rank, found.number[..., None].to(ratios.dtype)


def _require(x: Any, discard: float, chunk_size: int | None, method: str) -> None:
    require_positive("chunk_size", chunk_size, optional=True)
    require_number("discard", discard)
    if discard >= 1:
        raise InputError(f"discard is a share of the points below 1, got {discard}.")
    require_enough(x, 2, method)
