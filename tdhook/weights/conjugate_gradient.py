"""Linear systems with a matrix that is known by its products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..core.checks import require_positive
from ..core.errors import InputError


class Solution(NamedTuple):
    """The solution of a linear system.

    Attributes:
        value: the solution, in the structure of the right-hand side.
        residual: Tensor []: |A x - b| / |b| as the iteration knows it.
    """

    value: Any
    residual: Tensor


def conjugate_gradient(
    product: Callable[[Any], Any], b: Any, *, damping: float = 0.0, iterations: int = 100, tolerance: float = 1e-5
) -> Solution:
    """Solves `(A + damping I) x = b` for a positive definite A that is known by its products.

    The number of products is fixed, so that it compiles and vmaps; after convergence, or along a direction of negative
    curvature, the solution stays as it is. The residual says whether it is one.

    Args:
        product: function from a structure of tensors like `b` to `A` times it.
        b: a tensor, a list of tensors, or a TensorDict.
        damping: at least 0.
        iterations: how many products.
        tolerance: relative residual at which the solution is kept.

    Returns:
        `Solution` with `value` and `residual`.

    Raises:
        InputError: a damping or tolerance that is negative, no iteration.

    Cost: `iterations` products.

    Source: Hestenes and Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems" (1952).

    Examples:
        >>> a = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> conjugate_gradient(lambda v: a @ v, torch.tensor([3.0, 4.0]), iterations=2).value
        tensor([1., 1.])
    """
    require_positive("iterations", iterations)
    for name, number in (("damping", damping), ("tolerance", tolerance)):
        if isinstance(number, (int, float)) and not number >= 0:
            raise InputError(f"{name}={number!r} is negative; give a number of at least 0.")
    right, spec = pytree.tree_flatten(b)

    def apply(values: list[Tensor]) -> list[Tensor]:
        results = pytree.tree_flatten(product(pytree.tree_unflatten(values, spec)))[0]
        return [result + damping * value for result, value in zip(results, values)]

    x = [torch.zeros_like(r) for r in right]
    residual = direction = right
    size = start = _dot(right, right)
    for _ in range(iterations):
        pushed = apply(direction)
        curvature = _dot(direction, pushed)
        going = (size > tolerance**2 * start) & (curvature > 0)
        step = torch.where(going, size / torch.where(going, curvature, 1), 0)
        x = _along(x, step, direction)
        residual = _along(residual, -step, pushed)
        smaller = _dot(residual, residual)
        direction = _along(residual, torch.where(going, smaller / torch.where(going, size, 1), 0), direction)
        size = smaller
    relative = (size / torch.where(start > 0, start, 1)).sqrt()
    return Solution(pytree.tree_unflatten(x, spec), relative)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b)]).sum()


def _along(a: Sequence[Tensor], step: Tensor, b: Sequence[Tensor]) -> list[Tensor]:
    return [x + step * y for x, y in zip(a, b)]
