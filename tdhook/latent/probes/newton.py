"""Newton's method for logistic regression, damped, for all sites and tasks at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.compat import is_compiling, unwrapped
from .softmax import Softmax

HALVINGS = 10
CONJUGATE_STEPS = 200


class Minimum(NamedTuple):
    """Where a minimisation ended.

    Attributes:
        theta: Tensor [S, T, C, P].
        iterations: Tensor [S, T].
        converged: Tensor [S, T].
    """

    theta: Tensor
    iterations: Tensor
    converged: Tensor


def all_true(mask: Tensor) -> bool:
    """Whether a loop may end early, also under vmap, if for all of its lanes; compiled code runs to the end.

    What is done stays as it is, so the end of a loop has no effect on results.
    """
    return not is_compiling() and bool(unwrapped(mask).all())


def newton(problem: Softmax, squares: Tensor, *, tolerance: float, max_iterations: int, direct: bool) -> Minimum:
    """Minimises the loss from zero by damped Newton steps.

    Args:
        problem: the loss.
        squares: Tensor [S, P], the mean squares of the coordinates of x, which are principal axes.
        tolerance: of the gradient for each example, in units in which every coordinate has a mean square of 1.
        max_iterations: of Newton steps.
        direct: solve with the whole Hessian, else by conjugate gradients preconditioned with its mean over the examples.
    """
    shape = (len(problem.x), *problem.truth.shape[:2], problem.x.shape[-1])
    theta = problem.x.new_zeros(shape)
    margins = problem.margins(theta)
    loss = problem.loss(theta, margins)
    iterations = torch.zeros_like(loss, dtype=torch.int64)
    first = None
    products = problem if direct else problem.to(torch.float32)
    total = problem.weights.sum(-1)[:, None, None]
    expected = squares[:, None, None] + problem.penalties / total  # [S, T, 1, P]
    metric = torch.where(expected > 0, 1 / torch.where(expected > 0, expected, 1), 0)
    for i in range(max_iterations + 1):
        probabilities = problem.probabilities(margins)
        gradient = problem.gradient(theta, probabilities)
        size = _dot(gradient, metric * gradient).sqrt() / total[..., 0, 0]
        done = size <= tolerance
        if i == max_iterations or all_true(done):
            break
        first = size if first is None else first
        if direct:
            step = _solved(problem, gradient, probabilities)
        else:
            forcing = torch.where(first > 0, size / torch.where(first > 0, first, 1), 0).sqrt().clamp(max=0.1)
            step = _conjugate(products, squares, metric, gradient, probabilities, forcing, done)
        along = problem.margins(step)
        length = _damped(problem, theta, margins, loss, step, along, _dot(gradient, step), done)
        theta = theta + length[..., None, None] * step
        margins = margins + length[..., None, None] * along
        loss = problem.loss(theta, margins)
        iterations = iterations + ~done
    return Minimum(theta, iterations, done)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-1, -2))


def _solved(problem: Softmax, gradient: Tensor, probabilities: Tensor) -> Tensor:
    hessian = problem.hessian(probabilities)
    rows, width = gradient.shape[2:]
    scale = hessian.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    # Directions without curvature, which the gradient has no part in: a constant added to all classes, an empty coordinate.
    eye = torch.eye(width, dtype=hessian.dtype, device=hessian.device)
    ones = hessian.new_ones(rows, rows) * (rows > 1) / rows
    tiny = torch.finfo(hessian.dtype).eps * torch.eye(rows, dtype=hessian.dtype, device=hessian.device)
    hessian = hessian + scale * torch.kron(ones + tiny, eye)
    factor, failed = torch.linalg.cholesky_ex(hessian)
    step = -torch.cholesky_solve(gradient.flatten(2)[..., None], factor)[..., 0].unflatten(-1, (rows, width))
    usable = (failed == 0) & torch.isfinite(step).all(-1).all(-1)
    return torch.where(usable[..., None, None], step, -gradient / scale)


@torch.compiler.disable  # it would be unrolled to its last step
def _conjugate(
    problem: Softmax,
    squares: Tensor,
    metric: Tensor,
    gradient: Tensor,
    probabilities: Tensor,
    forcing: Tensor,
    done: Tensor,
) -> Tensor:
    """Solves for the step until the residual is below `forcing` times the gradient.

    In float32, which is enough for that: products with x are limited by the bandwidth of the memory. The next gradient, in the
    precision of the fit, corrects what rounding did.
    """
    dtype, size = gradient.dtype, _dot(gradient, metric * gradient).sqrt()[..., None, None]
    gradient = (gradient / torch.where(size > 0, size, 1)).to(torch.float32)
    squares, metric, probabilities = (t.to(torch.float32) for t in (squares, metric, probabilities))
    bound = forcing.to(torch.float32).clamp(min=1e-4)
    spread = (problem.weights[:, None] * probabilities * (1 - probabilities)).sum(-1)  # [S, T, C]
    diagonal = spread[..., None] * squares[:, None, None] + problem.penalties
    inverse = torch.where(diagonal > 0, 1 / torch.where(diagonal > 0, diagonal, 1), 0)
    step = torch.zeros_like(gradient)
    residual = -gradient
    conditioned = inverse * residual
    direction = conditioned
    slope = _dot(residual, conditioned)
    for _ in range(CONJUGATE_STEPS):
        pushed = problem.curved(direction, probabilities)
        curvature = _dot(direction, pushed)
        going = ~done & (curvature > 0)
        length = torch.where(going, slope / torch.where(going, curvature, 1), 0)[..., None, None]
        step = step + length * direction
        residual = residual - length * pushed
        done = ~going | (_dot(residual, metric * residual).sqrt() <= bound)
        if all_true(done):
            break
        conditioned = inverse * residual
        new = _dot(residual, conditioned)
        direction = conditioned + torch.where(done, 0, new / torch.where(slope > 0, slope, 1))[..., None, None] * direction
        slope = new
    return step.to(dtype) * size


def _damped(
    problem: Softmax, theta: Tensor, margins: Tensor, loss: Tensor, step: Tensor, along: Tensor, slope: Tensor, done: Tensor
) -> Tensor:
    """The longest of 1, 1/2, 1/4, ... at which the loss falls as much as the slope promises; 0 for what is done."""
    length = torch.where(done, 0, torch.ones_like(loss))
    slack = 16 * torch.finfo(loss.dtype).eps * loss.abs()
    for _ in range(HALVINGS):
        scale = length[..., None, None]
        reached = problem.loss(theta + scale * step, margins + scale * along)
        fine = done | (reached <= loss + 1e-4 * length * slope + slack)
        if all_true(fine):
            break
        length = torch.where(fine, length, length / 2)
    return length
