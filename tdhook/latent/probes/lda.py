"""Linear discriminant analysis, with shrinkage of the covariance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.checks import require_number
from ...core.compat import is_compiling, is_wrapped
from ...core.errors import InputError
from ...core.structure import describe
from .frame import frame
from .mean_difference import class_means, class_shares
from .problem import classification
from .spectrum import exact


def lda(
    x: Any,
    y: Tensor,
    *,
    shrinkage: float | str | None = None,
    priors: Tensor | None = None,
    classes: Tensor | int | None = None,
    standardize: bool = False,
    sample_weight: Tensor | None = None,
    fit_intercept: bool = True,
    chunk_size: int | None = None,
) -> Any:
    """Linear discriminant analysis: classes are Gaussian with one covariance.

        score_k(x) = mean_k^T S^-1 x - mean_k^T S^-1 mean_k / 2 + log prior_k        (x, means: from the mean of all examples)
        S = sum_k (N_k / N) S_k,   S_k = (1 - a) C_k + a trace(C_k) / D I,   C_k the covariance of class k (divided by N_k)

    Two classes have one row, the difference of the two scores. This is `LinearDiscriminantAnalysis(solver="lsqr")` of
    scikit-learn; its solver "svd" divides covariances by N - K. As there, `"auto"` shrinks the correlations of each class and
    not its variances. Where S is singular, the pseudo-inverse of its correlations is taken. Priors have no part in S.

    Args:
        x: Tensor [N, D], [S, N, D] for stacked sites, or a mapping of tensors [N, D_site] with the same examples; detached.
        y: integer Tensor [*T, N], labels; leading dimensions are tasks.
        shrinkage: None, a number a from 0 to 1, or `"auto"`: that of Ledoit and Wolf for each class, with weights as counts.
        priors: Tensor [K] in the order of the classes, of sum 1; None: the share of each class.
        classes: the labels; None: those found in y. Has to be given under vmap and compilation.
        standardize: shrink the covariance of standardised activations; without shrinkage it makes no difference.
        sample_weight: Tensor [N]; None: 1 for each. Examples of weight 0 are absent, whatever they hold.
        fit_intercept: False: b = 0.
        chunk_size: how many fits (sites times tasks) run at once; None for all. It does not change the result.

    Returns:
        `LinearProbe` with batch size [*T], or [S, *T] for stacked sites; a mapping of them for a mapping.

    Raises:
        InputError: shapes that do not match, NaN, one class only, a class of a single example, a bad option.

    Cost: for each fit the covariance of each class and one factorisation of D dimensions (in float64).

    Source: Fisher, "The Use of Multiple Measurements in Taxonomic Problems" (1936); Ledoit and Wolf, "A well-conditioned
    estimator for large-dimensional covariance matrices" (2004).

    Examples:
        >>> x, y = torch.tensor([[0.0], [2.0], [6.0], [8.0]]), torch.tensor([0, 0, 1, 1])
        >>> probe = lda(x, y)  # the means are 1 and 7, the variance is 1
        >>> probe.weight, probe.bias
        (tensor([[6.0]]), tensor([-24.0]))
    """
    _require_shrinkage(shrinkage)
    problem = classification(x, y, sample_weight, classes, least=2)
    assert problem.classes is not None
    count = problem.classes.shape[-1]
    priors = _require_priors(priors, count)

    def solve(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        framed = frame(exact(x), problem.weights, standardize=standardize, center=fit_intercept)
        weights = exact(problem.weights)
        shares = class_shares(y, weights, count)  # [T, K, N]
        means = class_means(framed.x, y, weights, count)  # [S, T, K, D]
        sizes = torch.where(y[:, None] == torch.arange(count, device=y.device)[:, None], weights, 0).sum(-1)
        fractions = sizes / weights.sum()
        own = fractions if priors is None else priors.to(sizes).expand(sizes.shape)
        covariance = torch.stack(
            [
                _pooled(framed.x, means[:, t], shares[t], sizes[t], fractions[t], shrinkage)  # each holds a copy of x
                for t in range(len(y))
            ],
            1,
        )
        if shrinkage is None or shrinkage == 0:
            # of the correlations: the smallest coordinate has as many digits as the largest
            deviation = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
            inverse = torch.where(deviation > 0, 1 / torch.where(deviation > 0, deviation, 1), 0)
            correlation = inverse[..., None] * covariance * inverse[..., None, :]
            rows = (means * inverse[:, :, None]) @ torch.linalg.pinv(correlation, hermitian=True) * inverse[:, :, None]
        else:
            scale = covariance.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
            tiny = torch.where(scale > 0, scale, 1) * torch.finfo(scale.dtype).eps
            factor = torch.linalg.cholesky(covariance + tiny * torch.eye(x.shape[-1], dtype=scale.dtype, device=x.device))
            rows = torch.cholesky_solve(means.mT, factor).mT
        bias = own.log() - (rows * means).sum(-1) / 2
        if count == 2:
            rows, bias = rows[:, :, 1:] - rows[:, :, :1], bias[..., 1:] - bias[..., :1]
        fields = framed.unit(rows, bias if fit_intercept else torch.zeros_like(bias))
        return {name: field.to(x.dtype) for name, field in fields.items()}

    return problem.solve(solve, chunk_size=chunk_size)


def _pooled(x: Tensor, means: Tensor, shares: Tensor, sizes: Tensor, fractions: Tensor, shrinkage: Any) -> Tensor:
    """The covariance [S, D, D] of all classes of a task."""
    total = x.new_zeros(len(x), x.shape[-1], x.shape[-1])
    for k in range(len(sizes)):
        total = total + fractions[k] * _covariance(x, means[:, k], shares[k], sizes[k], shrinkage)
    return total


def _covariance(x: Tensor, mean: Tensor, share: Tensor, size: Tensor, shrinkage: float | str | None) -> Tensor:
    """The covariance [S, D, D] of one class, with mean [S, D], shares [N] of its examples, and their number []."""
    share = share[:, None]
    centred = torch.where(share > 0, x - mean[:, None], 0)
    if shrinkage != "auto":
        covariance = (centred * share).mT @ centred
        return covariance if shrinkage is None else _shrunk(covariance, torch.full_like(covariance[:, 0, 0], float(shrinkage)))
    scale = (centred.square() * share).sum(-2).sqrt()
    scale = torch.where(scale > 0, scale, 1)
    centred = centred / scale[:, None]
    correlation = (centred * share).mT @ centred
    width = correlation.shape[-1]
    squared = correlation.square().sum((-1, -2))
    noise = ((centred.square().sum(-1).square() * share[:, 0]).sum(-1) - squared) / (width * size)
    excess = (squared - correlation.diagonal(dim1=-2, dim2=-1).sum(-1).square() / width) / width
    amount = torch.where(excess > 0, torch.minimum(noise, excess) / torch.where(excess > 0, excess, 1), 0)
    return scale[..., None] * _shrunk(correlation, amount) * scale[:, None]


def _shrunk(covariance: Tensor, amount: Tensor) -> Tensor:
    """(1 - amount) covariance + amount times its mean variance on the diagonal."""
    width = covariance.shape[-1]
    mean = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    eye = torch.eye(width, dtype=covariance.dtype, device=covariance.device)
    return (1 - amount)[..., None, None] * covariance + (amount * mean)[..., None, None] * eye


def _require_shrinkage(shrinkage: Any) -> None:
    if shrinkage is None or (isinstance(shrinkage, str) and shrinkage == "auto"):
        return
    if isinstance(shrinkage, str):
        raise InputError(f"shrinkage={shrinkage!r} is unknown; give None, 'auto' or a number from 0 to 1.")
    require_number("shrinkage", shrinkage)
    if shrinkage > 1:
        raise InputError(f"shrinkage is a number from 0 to 1, got {shrinkage!r}.")


def _require_priors(priors: Any, count: int) -> Tensor | None:
    if priors is None:
        return None
    if not isinstance(priors, Tensor) or priors.shape != (count,) or not priors.is_floating_point():
        raise InputError(f"priors has to be a floating-point tensor [{count}], got {describe(priors)}.")
    if not is_compiling() and not is_wrapped(priors) and not ((priors > 0).all() and abs(float(priors.sum()) - 1) < 1e-4):
        raise InputError(f"priors has to be positive with a sum of 1, got {priors.tolist()}.")
    return priors.detach()
