"""Accelerated proximal gradient steps for logistic regression with an L1 penalty."""

from __future__ import annotations

import torch
from torch import Tensor

from .newton import Minimum, all_true
from .softmax import Softmax

CHECK_EVERY = 10


@torch.compiler.disable  # it would be unrolled to its last step
def proximal(problem: Softmax, largest: Tensor, penalties: Tensor, *, tolerance: float, max_iterations: int) -> Minimum:
    """Minimises `loss + sum_j penalties_j |theta_j|` from zero.

    The momentum starts anew where it points uphill (O'Donoghue and Candes, 2015).

    Args:
        problem: the smooth part of the loss.
        largest: Tensor [S, T], a bound of the largest eigenvalue of its Hessian.
        penalties: Tensor [S, P].
        tolerance: of the gradient for each example, after the part that the penalty balances.
        max_iterations: of gradient steps.
    """
    shape = (len(problem.x), *problem.truth.shape[:2], problem.x.shape[-1])
    theta = ahead = problem.x.new_zeros(shape)
    rate = (1 / largest)[..., None, None]
    thresholds = rate * penalties[:, None, None]
    total = problem.weights.sum(-1)
    momentum = torch.ones_like(largest)
    done = torch.zeros_like(largest, dtype=torch.bool)
    iterations = torch.zeros_like(largest, dtype=torch.int64)
    for i in range(max_iterations):
        gradient = problem.gradient(ahead, problem.probabilities(problem.margins(ahead)))
        moved = ahead - rate * gradient
        new = moved.sign() * (moved.abs() - thresholds).clamp(min=0)
        moving = ~done[..., None, None]
        uphill = ((ahead - new) * (new - theta)).sum((-1, -2)) > 0
        following = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        push = torch.where(uphill, 0, (momentum - 1) / following)[..., None, None]
        change = (ahead - new).abs().amax((-1, -2)) * largest / total
        ahead = torch.where(moving, new + push * (new - theta), ahead)
        theta = torch.where(moving, new, theta)
        momentum = torch.where(uphill, 1, following)
        iterations = iterations + ~done
        done = done | (change <= tolerance)
        if i % CHECK_EVERY == 0 and all_true(done):
            break
    return Minimum(theta, iterations, done)
