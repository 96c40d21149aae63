"""Influence functions: how much more weight on a training example would change the loss of a test example."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..core.batching import chunks, vmap_or_loop
from ..core.checks import require_gradients, require_positive, warn_if_stochastic
from .conjugate_gradient import conjugate_gradient
from .curvature import curvature_product
from .examples import Loss, count_examples, indices, pair, require_loss
from .influence import gradient_of_example, products
from .moving import moving
from .selection import Select


class Influence(NamedTuple):
    """Influence functions and how well their systems were solved.

    Attributes:
        scores: Tensor [M, N].
        residual: Tensor [M]: |(H + damping) s - g| / |g| of the solution for each test example.
    """

    scores: Tensor
    residual: Tensor


def influence_functions(
    f: Any,
    params: Any,
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    loss: Loss,
    *,
    damping: float,
    iterations: int = 100,
    tolerance: float = 1e-5,
    curvature: Literal["gauss_newton", "hessian"] = "gauss_newton",
    select: Select = None,
    chunk_size: int | None = None,
) -> Influence:
    """How much more weight on each training example would lower the loss of each test example, after training again.

        influence[m, n] = grad loss(z_m)^T (H + damping I)^-1 grad loss(z_n)

    with the sign of `tracin`: positive is helpful. (Koh and Liang's `I_up,loss` has the other sign.)

    Args:
        f: function of `(params, inputs)`.
        params: parameters at or near a minimum of the mean loss of `train`.
        train: as in `tracin`.
        test: as in `tracin`.
        loss: as in `tracin`.
        select: as in `tracin`.
        damping: added to the curvature; it has to exceed the most negative eigenvalue for `curvature="hessian"`.
        iterations: see `tolerance`.
        tolerance: of `conjugate_gradient`.
        curvature: H of the mean training loss: `"gauss_newton"`, which is positive semidefinite for a convex loss of the
            output, or `"hessian"`.
        chunk_size: how many examples, of either set, run at once; None for all.

    Returns:
        `Influence` with `scores` [M, N] and `residual` [M].

    Raises:
        InputError: as `tracin`; a damping that is negative; an unknown curvature.

    Cost: `iterations` curvature products on the training set for each test example, vmapped over a chunk of them; then N
    gradients for each chunk.

    Source: Koh and Liang, "Understanding Black-box Predictions via Influence Functions" (2017); Martens, "New Insights and
    Perspectives on the Natural Gradient Method" (2020) for the Gauss-Newton matrix.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(2, 1, bias=False))
        >>> x = torch.eye(2)
        >>> data = (x, torch.zeros(2, 1))
        >>> influence_functions(f, params, data, data, torch.nn.functional.mse_loss, damping=0.1).scores.shape
        torch.Size([2, 2])
    """
    require_gradients("influence_functions")
    require_loss(loss)
    require_positive("chunk_size", chunk_size, optional=True)
    (inputs, labels), (test_inputs, test_labels) = pair("train", train), pair("test", test)
    count = count_examples("train", inputs, labels)
    tests = count_examples("test", test_inputs, test_labels)
    moved = moving(f, params, select)
    product = curvature_product(f, moved, inputs, labels, loss, curvature, chunk_size)
    warn_if_stochastic(f, "influence_functions")
    gradient = gradient_of_example(f, moved, inputs, labels, loss)
    test_gradient = gradient_of_example(f, moved, test_inputs, test_labels, loss)

    def solved(index: Tensor) -> Any:
        return conjugate_gradient(product, test_gradient(index), damping=damping, iterations=iterations, tolerance=tolerance)

    rows, residuals = [], []
    for part in chunks(tests, chunk_size):
        solution = vmap_or_loop(solved, indices(tests, test_inputs, part))
        rows.append(products(solution.value, gradient, indices(count, inputs), chunk_size))
        residuals.append(solution.residual)
    return Influence(torch.cat(rows), torch.cat(residuals))
