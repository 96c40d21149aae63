"""The difference of the means of two classes, as a probe."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.errors import InputError
from .frame import frame
from .problem import Problem, classification


def mean_difference(
    x: Any,
    y: Tensor,
    *,
    normalize: bool = True,
    classes: Tensor | int | None = None,
    standardize: bool = False,
    sample_weight: Tensor | None = None,
    fit_intercept: bool = True,
    chunk_size: int | None = None,
) -> Any:
    """The direction from the mean of one class to that of the other; the boundary is midway.

        w = mean_1 - mean_0,   b = -w (mean_1 + mean_0) / 2,   both divided by |w| if `normalize`

    Args:
        x: Tensor [N, D], [S, N, D] for stacked sites, or a mapping of tensors [N, D_site] with the same examples; detached.
        y: integer Tensor [*T, N], labels of two classes; leading dimensions are tasks.
        normalize: scores are distances from the boundary. Not for a difference of zero, which stays zero.
        classes: the two labels, the positive one last; None: those found in y, in order. Has to be given under vmap and
            compilation.
        standardize: take the difference in standardised activations. The result is in the units of `x` all the same, and
            `normalize` is about the standardised ones.
        sample_weight: Tensor [N]; None: 1 for each. Examples of weight 0 are absent, whatever they hold.
        fit_intercept: False: b = 0.
        chunk_size: how many fits (sites times tasks) run at once; None for all. It does not change the result.

    Returns:
        `LinearProbe` with batch size [*T], or [S, *T] for stacked sites; a mapping of them for a mapping.

    Raises:
        InputError: shapes that do not match, NaN, another number of classes than two.

    Cost: one product with x for each site.

    Source: Marks and Tegmark, "The Geometry of Truth" (2023).

    Examples:
        >>> x, y = torch.tensor([[0.0, 1.0], [0.0, 3.0], [4.0, 1.0], [4.0, 3.0]]), torch.tensor([0, 0, 1, 1])
        >>> probe = mean_difference(x, y, normalize=False)
        >>> probe.weight, probe.bias
        (tensor([[4., 0.]]), tensor([-8.]))
    """
    problem = classification(x, y, sample_weight, classes)
    require_binary(problem, "mean_difference")

    def solve(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        framed = frame(x, problem.weights, standardize=standardize, center=fit_intercept)
        means = class_means(framed.x, y, problem.weights, 2)
        weight = means[:, :, 1:] - means[:, :, :1]
        bias = -(weight * means.sum(2, keepdim=True)).sum(-1) / 2 if fit_intercept else torch.zeros_like(weight[..., 0])
        norm = weight.norm(dim=-1)
        scale = torch.where(norm > 0, norm, 1) if normalize else torch.ones_like(norm)
        return framed.unit(weight / scale[..., None], bias / scale)

    return problem.solve(solve, chunk_size=chunk_size)


def require_binary(problem: Problem, method: str) -> None:
    """Raises `InputError` unless there are two classes."""
    assert problem.classes is not None
    if problem.classes.shape[-1] != 2:
        raise InputError(f"{method} is for two classes, y has {problem.classes.shape[-1]}; use `lda` or `logistic` for more.")


def class_means(x: Tensor, y: Tensor, weights: Tensor, count: int) -> Tensor:
    """The means [S, T, K, D] of x [S, N, D] over the examples of each class of y [T, N]; 0 for a class without weight."""
    member = class_shares(y, weights, count).to(x.dtype)
    return (member.flatten(0, 1) @ x).unflatten(1, member.shape[:2])


def class_shares(y: Tensor, weights: Tensor, count: int) -> Tensor:
    """Tensor [T, K, N]: the weight of each example within its class; 0 in other classes."""
    own = torch.where(y[:, None] == torch.arange(count, device=y.device)[:, None], weights, 0)
    total = own.sum(-1, keepdim=True)
    return own / torch.where(total > 0, total, 1)
