"""Regression probes in closed form: ridge, with the penalty chosen by leaving one out, and least squares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.checks import require_number
from ...core.errors import InputError
from .frame import Frame, frame
from .problem import regression
from .spectrum import exact, spectrum


def ridge(
    x: Any,
    y: Tensor,
    *,
    penalty: float | Sequence[float] = 1.0,
    standardize: bool = True,
    sample_weight: Tensor | None = None,
    fit_intercept: bool = True,
    chunk_size: int | None = None,
) -> Any:
    """Ridge regression: a value read linearly; the penalty may be chosen by the exact leave-one-out error.

        min over w, b of  sum_i w_i (w x_i + b - y_i)^2 + penalty |w|^2
        leave-one-out residual of example i = (w x_i + b - y_i) / (1 - h_i),  h_i its leverage

    This is `Ridge(alpha=penalty)` of scikit-learn, and `RidgeCV` for several candidates. With `standardize` the penalty is on
    the weights of standardised activations; the result is in the units of `x` all the same. The leave-one-out residuals keep
    the scale that all examples have together, everything else is as if the example had not been there.

    Args:
        x: Tensor [N, D], [S, N, D] for stacked sites, or a mapping of tensors [N, D_site] with the same examples; detached.
        y: Tensor [*T, N], values; leading dimensions are tasks.
        penalty: a positive number, or candidates, from which every task of every site takes the best.
        standardize: divide activations by their standard deviation.
        sample_weight: Tensor [N]; None: 1 for each. Examples of weight 0 are absent, whatever they hold.
        fit_intercept: False: b = 0, and activations are not centred.
        chunk_size: how many fits (sites times tasks) run at once; None for all. It does not change the result.

    Returns:
        `LinearProbe` with batch size [*T], or [S, *T] for stacked sites, with `penalty` and, for L candidates, `loo_errors`
        [*batch, L], weighted mean squares; a mapping of them for a mapping.

    Raises:
        InputError: shapes that do not match, NaN, a penalty that is not positive, candidates for a single example.

    Cost: for each site one eigendecomposition of min(N, D) dimensions (in float64), for all tasks and candidates.

    Source: Hoerl and Kennard, "Ridge Regression" (1970); Golub, Heath, Wahba, "Generalized Cross-Validation as a Method for
    Choosing a Good Ridge Parameter" (1979).

    Examples:
        >>> x, direction = torch.randn(50, 4), torch.tensor([1.0, 2.0, 0.0, 0.0])
        >>> probe = ridge(x, x @ direction + 3, penalty=[1e-4, 1.0, 1e4])
        >>> probe.penalty, torch.allclose(probe.weight[0], direction, atol=1e-3), torch.allclose(probe.bias, torch.tensor(3.0))
        (tensor(0.0001), True, True)
    """
    candidates = _candidates(penalty)
    several = not isinstance(penalty, (int, float))
    problem = regression(x, y, sample_weight, least=2 if several else 1)

    def prepare(x: Tensor) -> Callable[[Tensor], dict[str, Tensor]]:
        framed = frame(exact(x), problem.weights, standardize=standardize, center=fit_intercept)
        weights = exact(problem.weights)
        axes, squares = spectrum(framed.x, weights)
        z = framed.x @ axes
        inverse = 1 / (squares[:, None] + candidates.to(squares)[:, None])  # [S, L, R]
        leverage = weights[:, None] * (z.square() @ inverse.mT + (1 / weights.sum() if fit_intercept else 0))

        def solve(y: Tensor) -> dict[str, Tensor]:
            mean, target = _centred(exact(y), weights, fit_intercept)
            fits = ((target * weights) @ z)[:, :, None] * inverse[:, None]  # [S, T, L, R]
            chosen = torch.zeros_like(fits[..., 0, 0], dtype=torch.int64)
            errors = {}
            if several:
                residuals = (z[:, None] @ fits.mT - target[..., None]) / (1 - leverage[:, None])  # [S, T, N, L]
                found = (weights[:, None] * residuals.square()).sum(-2) / weights.sum()
                chosen = found.argmin(-1)
                errors["loo_errors"] = found.to(x.dtype)
            best = fits.take_along_dim(chosen[..., None, None], 2)
            fields = _restored(framed, best @ axes[:, None].mT, mean, x.dtype)
            return {**fields, "penalty": candidates.to(x)[chosen], **errors}

        return solve

    return problem.solve_shared(prepare, chunk_size=chunk_size)


def least_squares(
    x: Any,
    y: Tensor,
    *,
    standardize: bool = False,
    sample_weight: Tensor | None = None,
    fit_intercept: bool = True,
    chunk_size: int | None = None,
) -> Any:
    """Ordinary least squares; where there are several solutions, the one with the smallest weights.

        min over w, b of  sum_i w_i (w x_i + b - y_i)^2

    This is `LinearRegression` of scikit-learn.

    Args:
        x: Tensor [N, D], [S, N, D] for stacked sites, or a mapping of tensors [N, D_site] with the same examples; detached.
        y: Tensor [*T, N], values; leading dimensions are tasks.
        standardize: divide activations by their standard deviation, which only says which weights are the smallest.
        sample_weight: Tensor [N]; None: 1 for each. Examples of weight 0 are absent, whatever they hold.
        fit_intercept: False: b = 0, and activations are not centred.
        chunk_size: how many fits (sites times tasks) run at once; None for all. It does not change the result.

    Returns:
        `LinearProbe` with batch size [*T], or [S, *T] for stacked sites; a mapping of them for a mapping.

    Raises:
        InputError: shapes that do not match, NaN.

    Cost: for each site one singular value decomposition of N x D (in float64), for all tasks.

    Examples:
        >>> x = torch.randn(20, 3)
        >>> probe = least_squares(x, torch.stack([x[:, 0], 2 * x[:, 1] - 1]))
        >>> probe.weight[:, 0].round(decimals=4).abs(), probe.bias.round(decimals=4).abs()
        (tensor([[1., 0., 0.], [0., 2., 0.]]), tensor([[0.], [1.]]))
    """
    problem = regression(x, y, sample_weight)

    def prepare(x: Tensor) -> Callable[[Tensor], dict[str, Tensor]]:
        framed = frame(exact(x), problem.weights, standardize=standardize, center=fit_intercept)
        weights = exact(problem.weights)
        u, values, v = torch.linalg.svd(weights.sqrt()[:, None] * framed.x, full_matrices=False)
        kept = values > values.amax(-1, keepdim=True) * max(x.shape[1:]) * torch.finfo(x.dtype).eps
        inverse = torch.where(kept, 1 / torch.where(kept, values, 1), 0)

        def solve(y: Tensor) -> dict[str, Tensor]:
            mean, target = _centred(exact(y), weights, fit_intercept)
            weight = (((weights.sqrt() * target) @ u) * inverse[:, None]) @ v
            return _restored(framed, weight[:, :, None], mean, x.dtype)

        return solve

    return problem.solve_shared(prepare, chunk_size=chunk_size)


def _centred(y: Tensor, weights: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """The means [T] of y [T, N], and what is left of it."""
    mean = (y * weights).sum(-1) / weights.sum() if center else torch.zeros_like(y[:, 0])
    return mean, torch.where(weights > 0, y - mean[:, None], 0)


def _restored(framed: Frame, weight: Tensor, mean: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The fields of probes with weight [S, T, 1, D]."""
    fields = framed.unit(weight, mean[:, None].expand(weight.shape[:-1]))
    return {name: field.to(dtype) for name, field in fields.items()}


def _candidates(penalty: Any) -> Tensor:
    several = list(penalty) if isinstance(penalty, (list, tuple, Tensor)) else [penalty]
    if not several:
        raise InputError("penalty has no candidate; give at least one positive number.")
    for number in several:
        require_number("penalty", float(number) if isinstance(number, Tensor) else number, strict=True)
    return torch.tensor([float(number) for number in several], dtype=torch.float64)
