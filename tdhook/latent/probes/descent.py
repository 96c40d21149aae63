"""Minimisers of many functions at once, as pure functions of tensors [*J, P]: one row of parameters for each job.

A job that is done stays as it is while others go on, so that none depends on what is fitted beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from .newton import all_true

Objective = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From parameters [*J, P] to values [*J] and gradients [*J, P]."""

MEMORY = 10  # pairs of steps and gradient differences
HALVINGS = 20
SUFFICIENT = 1e-4  # share of the decrease that the slope promises (Armijo)


class Minimum(NamedTuple):
    """What a minimiser found.

    Attributes:
        parameters: Tensor [*J, P].
        value: Tensor [*J].
        gradient: Tensor [*J], its largest component in magnitude.
    """

    parameters: Tensor
    value: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Layout:
    """Where named tensors lie in a row of parameters."""

    shapes: Mapping[str, Sequence[int]]

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Tensors [*lead, *shape] as one [*lead, P]."""
        parts = [values[name].flatten(values[name].ndim - len(shape)) for name, shape in self.shapes.items()]
        return torch.cat(parts, -1)

    def unpack(self, flat: Tensor) -> dict[str, Tensor]:
        """The tensors [*lead, *shape] in [*lead, P]."""
        parts = flat.split([prod(shape) for shape in self.shapes.values()], -1)
        return {name: part.unflatten(-1, tuple(shape)) for part, (name, shape) in zip(parts, self.shapes.items())}


class differentiable(ExitStack):
    """Gradients by torch.func, also where the caller has switched autograd off."""

    def __enter__(self) -> differentiable:
        super().__enter__()
        if torch.is_inference_mode_enabled():
            self.enter_context(torch.inference_mode(False))
        self.enter_context(torch.enable_grad())
        return self


def usable(tensor: Tensor) -> Tensor:
    """The tensor as one that gradients can be taken with, without gradients of its own."""
    return (tensor.clone() if tensor.is_inference() else tensor).detach()


def each_job(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of parameters [P], x [N, D], y [N] and weights [N], for all sites and tasks: [S, T, P], [S, N, D], [T, N]."""
    return vmap(vmap(function, (0, None, 0, None)), (0, 0, None, None))


def lbfgs(objective: Objective, start: Tensor, *, steps: int, tolerance: float) -> Minimum:
    """Limited-memory BFGS with a backtracking line search.

    Args:
        objective: values and gradients of all jobs.
        start: Tensor [*J, P].
        steps: at most so many.
        tolerance: of the largest component of the gradient, at which a job is done.

    Source: Liu and Nocedal, "On the Limited Memory BFGS Method for Large Scale Optimization" (1989).
    """
    x, (value, gradient) = start, objective(start)
    done = gradient.abs().amax(-1) <= tolerance
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    scale = 1 / gradient.abs().sum(-1).clamp(min=1)
    for _ in range(steps):
        if all_true(done):
            break
        direction = -_inverse_hessian(pairs, gradient, scale)
        slope = (gradient * direction).sum(-1)
        descends = slope < 0
        direction = torch.where(descends[..., None], direction, -gradient)
        slope = torch.where(descends, slope, -gradient.square().sum(-1))
        new, new_value, new_gradient, found = _backtrack(objective, x, value, gradient, direction, slope, done)
        step, change = new - x, new_gradient - gradient
        curvature, size = (step * change).sum(-1), change.square().sum(-1)
        usable = curvature > torch.finfo(x.dtype).eps * size
        rho = torch.where(usable, 1 / torch.where(usable, curvature, 1), 0)
        pairs = [*pairs, (step, change, rho)][-MEMORY:]
        scale = torch.where(usable, curvature / torch.where(usable, size, 1), scale)
        x, value, gradient = new, new_value, new_gradient
        # Where rounding hides every decrease, the search finds none: no better point can be told.
        done = done | ~found | (gradient.abs().amax(-1) <= tolerance)
    return Minimum(x, value, gradient.abs().amax(-1))


class Adam(NamedTuple):
    """The state of Adam.

    Attributes:
        first, second: Tensor [*J, P], running means of gradients and of their squares.
        steps: how many were made.
    """

    first: Any = 0.0
    second: Any = 0.0
    steps: int = 0

    def step(
        self, parameters: Tensor, gradient: Tensor, learning_rate: float, betas: tuple[float, float] = (0.9, 0.999)
    ) -> tuple[Tensor, Adam]:
        """The parameters and the state after one more gradient.

        Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization" (2015).
        """
        count = self.steps + 1
        first = betas[0] * self.first + (1 - betas[0]) * gradient
        second = betas[1] * self.second + (1 - betas[1]) * gradient.square()
        rate = second.div(1 - betas[1] ** count).sqrt() + 1e-8
        return parameters - learning_rate * (first / (1 - betas[0] ** count)) / rate, Adam(first, second, count)


def _inverse_hessian(pairs: Sequence[tuple[Tensor, Tensor, Tensor]], gradient: Tensor, scale: Tensor) -> Tensor:
    """The approximate inverse Hessian times the gradient; pairs with rho = 0 do not count."""
    result, shares = gradient, []
    for step, change, rho in reversed(pairs):
        share = rho * (step * result).sum(-1)
        shares.append(share)
        result = result - share[..., None] * change
    result = scale[..., None] * result
    for (step, change, rho), share in zip(pairs, reversed(shares)):
        result = result + (share - rho * (change * result).sum(-1))[..., None] * step
    return result


def _backtrack(
    objective: Objective, x: Tensor, value: Tensor, gradient: Tensor, direction: Tensor, slope: Tensor, done: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first point along the direction, halving the step, that is low enough; the point itself where there is none."""
    best, best_value, best_gradient, found = x, value, gradient, done
    step = torch.ones_like(value)
    for _ in range(HALVINGS):
        trial = x + step[..., None] * direction
        trial_value, trial_gradient = objective(trial)
        low = (trial_value <= value + SUFFICIENT * step * slope) & ~found
        best = torch.where(low[..., None], trial, best)
        best_value = torch.where(low, trial_value, best_value)
        best_gradient = torch.where(low[..., None], trial_gradient, best_gradient)
        found = found | low
        if all_true(found):
            break
        step = step / 2
    return best, best_value, best_gradient, found
