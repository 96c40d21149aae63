"""How an estimate varies with the sample: over scales, and from sample to sample."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import torch
from tensordict import tensorclass
from torch import Tensor

from ...core.batching import chunks
from ...core.checks import require_number, require_positive
from ...core.errors import InputError
from ...core.neighbours import require_points
from ...core.randomness import require_generator, uniform, uniform_rows
from .estimates import of_sites

Estimator = Callable[[Tensor], Any]


@tensorclass
class ScaleCurve:
    """The dimension of ever smaller samples: the larger the distances, the coarser the scale.

    Attributes:
        sizes: Tensor [S] of integers: how many points each sample has.
        value: Tensor [S, *lead]: the mean over the disjoint samples of that size.
        standard_error: Tensor [S, *lead]: of the mean; NaN for the whole set, which is one sample.
    """

    sizes: Tensor
    value: Tensor
    standard_error: Tensor


@tensorclass
class Interval:
    """A confidence interval, for each set of points.

    Attributes:
        value: Tensor [*lead]: the estimate from all points.
        standard_error, low, high: Tensor [*lead].
    """

    value: Tensor
    standard_error: Tensor
    low: Tensor
    high: Tensor


@of_sites(1)
def scale_curve(
    estimator: Estimator,
    x: Any,
    *,
    halvings: int = 4,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> ScaleCurve:
    """The dimension of N, N/2, N/4, ... points: flat where the data have one dimension at these scales.

    Noise adds its own dimensions at small scales, that is to the whole set; a plateau further on is the dimension without it.
    For each size the points, in random order, are cut into disjoint samples.

    Args:
        estimator: from points [*lead, n, D] to a `Dimension` or Tensor [*lead]: `two_nn`, or a `functools.partial` of it.
        x: Tensor [*lead, N, D], or a mapping from sites to such tensors.
        halvings: how often the size is halved.
        generator: of the order of the points, which all of `lead` share.
        chunk_size: number of samples estimated at once; None for all of a size.

    Returns:
        ScaleCurve: sizes [S], value and standard error [S, *lead], S = halvings + 1; or a TensorDict of them keyed by site.

    Raises:
        InputError: too few points for so many halvings, or for the estimator.

    Cost: less than two estimates from all points, and as many calls as halvings.

    Source: Facco et al. (2017), the block analysis of the scale.

    Examples:
        >>> from tdhook.latent.dimension import two_nn
        >>> points = torch.rand(800, 2) @ torch.randn(2, 10) + 0.01 * torch.randn(800, 10)
        >>> curve = scale_curve(two_nn, points, halvings=3)
        >>> curve.sizes
        tensor([800, 400, 200, 100])
        >>> bool(curve.value[0] > curve.value[3])
        True
    """
    require_points("x", x)
    require_positive("halvings", halvings, least=0)
    require_positive("chunk_size", chunk_size, optional=True)
    require_generator(generator)
    count = x.shape[-2]
    if count >> halvings < 3:
        raise InputError(f"halvings={halvings} leaves {count >> halvings} of {count} points; leave at least 3.")
    order = uniform((count,), generator, x.device, torch.float64).argsort()
    sizes, means, errors = [], [], []
    for halving in range(halvings + 1):
        size, many = count >> halving, 2**halving
        values = _estimates(estimator, x, order[: size * many].reshape(many, size), chunk_size)
        sizes.append(size)
        means.append(values.mean(0))
        errors.append(values.std(0) / many**0.5 if many > 1 else torch.full_like(values[0], torch.nan))
    return ScaleCurve(  # type: ignore[call-arg]
        sizes=torch.tensor(sizes), value=torch.stack(means), standard_error=torch.stack(errors), batch_size=[len(sizes)]
    )


@of_sites(1)
def confidence_interval(
    estimator: Estimator,
    x: Any,
    *,
    samples: int = 200,
    share: float = 0.125,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> Interval:
    """An interval for an estimate, from smaller samples drawn without replacement.

        s^2 = m / N * variance of log d_s            over samples of m = share * N points
        standard error = d s,   interval = d exp(+- z s)            z: of the normal distribution, 1.96 for 95 %

    A bootstrap draws points several times, and these are their own nearest neighbours at distance 0: for statistics of nearest
    neighbours it is not consistent (Abadie and Imbens, 2008). Smaller samples without replacement are. What counts is their
    spread, in logarithms, not where they lie: at another scale the data may have another dimension. So the interval is about
    chance, not about the bias of an estimator. Of what is no statistic of neighbours, such as the participation ratio, the
    standard error is too small by the factor sqrt(1 - share).

    Args:
        estimator: from points [*lead, n, D] to a `Dimension` or Tensor [*lead]: `two_nn`, or a `functools.partial` of it.
        x: Tensor [*lead, N, D], or a mapping from sites to such tensors; points that are independent of each other.
        samples: how many samples are drawn.
        share: the size of a sample over N, at most 0.5.
        confidence: of the interval.
        generator: of the samples, which all of `lead` share.
        chunk_size: number of samples estimated at once; None for all.

    Returns:
        Interval: value, standard error, low and high, each [*lead]; or a TensorDict of them keyed by site.

    Raises:
        InputError: a bad option, too few points for the estimator in a sample.

    Cost: an estimate from all points, and `samples * share^2` such estimates (3 by default).

    Source: Politis, Romano, "Large Sample Confidence Regions Based on Subsamples under Minimal Assumptions" (1994); Abadie,
    Imbens, "On the Failure of the Bootstrap for Matching Estimators" (2008).

    Examples:
        >>> from tdhook.latent.dimension import two_nn
        >>> found = confidence_interval(two_nn, torch.rand(800, 2))
        >>> bool((found.low < 2) & (2 < found.high))
        True
    """
    require_points("x", x)
    require_positive("samples", samples, least=2)
    require_positive("chunk_size", chunk_size, optional=True)
    require_number("share", share, strict=True)
    require_number("confidence", confidence, strict=True)
    if share > 0.5 or confidence >= 1:
        raise InputError(f"share is at most 0.5 and confidence below 1, got {share} and {confidence}.")
    require_generator(generator)
    count = x.shape[-2]
    size = int(share * count)
    if size < 3:
        raise InputError(f"share={share} of {count} points are {size}; let it be at least 3 points.")
    value = _value(estimator(x))
    chosen = uniform_rows(samples, count, generator, x.device).argsort(-1)[:, :size]
    values = _estimates(estimator, x, chosen, chunk_size)
    spread = values.log().std(0) * (size / count) ** 0.5
    reach = (NormalDist().inv_cdf((1 + confidence) / 2) * spread).exp()
    interval = {"low": value / reach, "high": value * reach}
    return Interval(value=value, standard_error=value * spread, **interval, batch_size=value.shape)  # type: ignore[call-arg]


def _estimates(estimator: Estimator, x: Tensor, indices: Tensor, chunk_size: int | None) -> Tensor:
    """Estimates [S, *lead] from the points with indices [S, n]."""
    found = []
    for part in chunks(len(indices), chunk_size):
        points = torch.stack([x.index_select(-2, each) for each in indices[part]])
        found.append(_value(estimator(points)))
    return torch.cat(found)


def _value(estimate: Any) -> Tensor:
    return estimate if isinstance(estimate, Tensor) else estimate.value
