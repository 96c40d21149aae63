"""Noisy linear imputation: removed pixels as the weighted mean of their neighbours, all at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.compat import is_compiling, is_wrapped
from ..core.errors import InputError
from ..core.structure import describe

SOLVERS = ("auto", "dense", "conjugate_gradient")
DENSE_PIXELS = 1024  # a matrix of this edge takes 8 MB in float64, for each image


def linear_imputation(images: Tensor, removed: Tensor, *, solver: str = "auto") -> Tensor:
    """Images whose removed pixels are the weighted mean of their eight neighbours.

        u_p = sum_q k_pq u_q / sum_q k_pq over the neighbours q of p inside of the image, for removed p
        k_pq = 1/6 for direct neighbours, 1/12 for diagonal ones;  u_p = x_p for the others

    Args:
        images: Tensor [*lead, C, H, W], floating-point.
        removed: boolean Tensor [*lead, H, W], True for what is to be replaced; at least one pixel of each image stays.
        solver: `"dense"`: LU factorisation of a matrix [H W, H W] for each image. `"conjugate_gradient"`: iterations without a
            matrix, until the residual is below 1e-6 (float32) or 1e-12 (float64) of the right-hand side, and at most 4 (H + W),
            by when it hardly ever is not. `"auto"`: dense up to 1024 pixels.

    Returns:
        Tensor [*lead, C, H, W]; NaN for an image without a pixel that stays. Half types are solved in float32.

    Raises:
        InputError: shapes or dtypes that do not fit, an unknown `solver`.

    Cost: `dense`: O((H W)^3) for each image; `conjugate_gradient`: O(H W C (H + W)). Inside of `torch.compile` and vmap the
    iterations cannot end early, and a compiled graph holds all of them: leave large images out of it.

    The matrix is symmetric, and positive definite while a pixel stays, which is why conjugate gradients converge. The authors'
    code solves the same equations with a sparse solver of scipy.

    Source: Rong et al., "A Consistent and Efficient Evaluation Strategy for Attribution Methods" (2022).

    Examples:
        >>> ramp = torch.arange(5.0).expand(1, 5, 5)
        >>> removed = torch.zeros(5, 5, dtype=torch.bool)
        >>> removed[1:4, 1:4] = True
        >>> torch.allclose(linear_imputation(torch.where(removed, 9.0, ramp), removed), ramp, atol=1e-5)
        True
    """
    require_solver(solver)
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim < 3:
        raise InputError(f"images is {describe(images)}; give a floating-point tensor [*lead, C, H, W].")
    shape = [*images.shape[:-3], *images.shape[-2:]]
    if not isinstance(removed, Tensor) or removed.dtype is not torch.bool or list(removed.shape) != shape:
        raise InputError(f"removed is {describe(removed)}; give a boolean tensor of shape {shape}.")
    height, width = images.shape[-2:]
    values = images.to(torch.promote_types(images.dtype, torch.float32))
    missing = removed[..., None, :, :]
    known = torch.where(missing, 0, values)
    dense = solver == "dense" or (solver == "auto" and height * width <= DENSE_PIXELS)
    solved = _solve_dense(known, missing) if dense else _solve_iteratively(known, missing)
    # Without a pixel that stays the solution is not unique.
    solved = torch.where(missing.all(-1, keepdim=True).all(-2, keepdim=True), torch.nan, solved)
    return torch.where(missing, solved, values).to(images.dtype)


def require_solver(solver: str) -> None:
    """Raises `InputError` for an unknown solver."""
    if solver not in SOLVERS:
        raise InputError(f"solver is {describe(solver)}; choose {', '.join(map(repr, SOLVERS))}.")


def _neighbour_sums(images: Tensor) -> Tensor:
    """sum_q k_pq u_q for every pixel p of images [..., H, W]; beyond the border there is nothing."""
    # The kernel is (1, 2, 1) along both axes without its centre. A convolution would be slower, and TF32 on a GPU.
    rows = pad(images, (0, 0, 1, 1))
    rows = rows[..., :-2, :] + 2 * images + rows[..., 2:, :]
    columns = pad(rows, (1, 1))
    return (columns[..., :-2] + 2 * rows + columns[..., 2:] - 4 * images) / 12


def _solve_dense(known: Tensor, missing: Tensor) -> Tensor:
    height, width = known.shape[-2:]
    pixels = height * width
    identity = torch.eye(pixels, dtype=known.dtype, device=known.device)
    links = _neighbour_sums(identity.reshape(pixels, height, width)).reshape(pixels, pixels)
    unknown = missing.flatten(-2)[..., 0, :]  # [*lead, P]
    both = unknown[..., :, None] & unknown[..., None, :]
    diagonal = torch.where(unknown, links.sum(-1), 1)
    # All pixels are unknowns, those that stay with an equation of their own: so the shape does not depend on values.
    matrix = torch.diag_embed(diagonal) - torch.where(both, links, 0)
    right = torch.where(missing, _neighbour_sums(known), 0).flatten(-2).mT  # [*lead, P, C]
    # A pixel must stay, or the matrix is singular; the result is NaN then.
    matrix = torch.where(unknown.all(-1)[..., None, None], identity, matrix)
    return torch.linalg.solve(matrix, right).mT.reshape(known.shape)


def _solve_iteratively(known: Tensor, missing: Tensor) -> Tensor:
    """Conjugate gradients from zero, for all images and channels side by side."""
    height, width = known.shape[-2:]
    weight = _neighbour_sums(torch.ones(height, width, dtype=known.dtype, device=known.device))
    readable = not (is_compiling() or is_wrapped(known) or is_wrapped(missing) or known.is_meta)
    tolerance = 1e-12 if known.dtype == torch.float64 else 1e-6

    def applied(v: Tensor) -> Tensor:
        return torch.where(missing, weight * v - _neighbour_sums(v), 0)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((-2, -1), keepdim=True)

    residual = torch.where(missing, _neighbour_sums(known), 0)
    solution, direction, square = torch.zeros_like(known), residual, dot(residual, residual)
    enough = square * tolerance**2
    for iteration in range(4 * (height + width)):
        if readable and iteration % 8 == 0 and bool((square <= enough).all()):
            break
        # What is solved stays as it is, where the quotients are 0 / 0.
        going = square > enough
        image = applied(direction)
        step = torch.where(going, square / dot(direction, image), 0)
        solution = solution + step * direction
        residual = residual - step * image
        after = dot(residual, residual)
        direction = residual + torch.where(going, after / square, 0) * direction
        square = torch.where(going, after, square)
    return solution
