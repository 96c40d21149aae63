"""Rules for linear layers, convolutions and products with parameters: how the relevance of z = W x + b goes to x.

A rule replaces z by parts z_k, each an affine map of x with other weights, and gives the derivative

    dz = sum_k c_k dz_k        with c_k = z * weight of the part / z_k taken as constants

so that x * cotangent is the relevance, as for a gradient. W+ and W- are the positive and negative parts of the weights, x+ and
x- those of the operand; where that is known not to be negative (it comes out of a ReLU), the products with x- are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.errors import RuleError
from ...core.rules import Affine, Operation, Rule
from .stabilizers import ratio, require_stabilizer

AFFINE = frozenset({"linear", "convolution"})


@dataclass(frozen=True)
class Epsilon(Rule):
    """The epsilon rule: shares in proportion to contributions, and absorbs the more, the smaller the sum is.

        R_i = sum_j x_i W_ji / (z_j + epsilon sign(z_j)) R_j

    With epsilon = 0 it is the 0-rule (LRP-0), which the plain gradient gives without anything being done.

    Source: Bach et al., "On Pixel-Wise Explanations for Non-Linear Classifier Decisions" (2015), equation 58.
    """

    epsilon: float = 1e-6

    groups: ClassVar = None

    def __post_init__(self) -> None:
        require_stabilizer("epsilon", self.epsilon)

    def __call__(self, operation: Operation) -> Any:
        z = operation.evaluate()
        if self.epsilon == 0:
            return z

        def share(z: Tensor) -> Tensor:
            size = z.to(torch.promote_types(z.dtype, torch.float32)).abs()
            return (size / (size + self.epsilon)).to(z.dtype)

        return operation.scaled(z, share)


@dataclass(frozen=True)
class Gamma(Rule):
    """The generalised gamma rule: favours contributions of the sign of the output.

        z > 0:  R_i = sum_j (x_i W_ji + gamma (x_i W_ji)+) / A_j R_j      A = the sum of these over i, with the bias
        z < 0:  the same with (.)- and C

    Source: Montavon et al., "Layer-Wise Relevance Propagation: An Overview" (2019); for operands of both signs Andéol et al.,
    "Learning Domain Invariant Representations by Joint Wasserstein Distance Minimization" (2021).
    """

    gamma: float = 0.25
    stabilizer: float = 1e-6

    groups: ClassVar = AFFINE

    def __post_init__(self) -> None:
        require_stabilizer("gamma", self.gamma)
        require_stabilizer("stabilizer", self.stabilizer)

    def __call__(self, operation: Operation) -> Tensor:
        affine = operation.affine()
        z = affine.value()
        up, down = _parts(affine, lambda w: w + self.gamma * w.clamp(min=0), lambda w: w + self.gamma * w.clamp(max=0))
        fixed = operation.constant(z)
        zero = torch.zeros_like(fixed)
        c_up = ratio(torch.where(fixed > 0, fixed, zero), operation.constant(up), self.stabilizer)
        c_down = ratio(torch.where(fixed < 0, fixed, zero), operation.constant(down), self.stabilizer)
        return operation.same_value(z, up * operation.constant(c_up) + down * operation.constant(c_down))


@dataclass(frozen=True)
class AlphaBeta(Rule):
    """The alpha-beta rule: positive and negative contributions apart.

        R_i = sum_j (alpha (x_i W_ji)+ / A_j - beta (x_i W_ji)- / B_j) R_j        alpha - beta = 1

    where A and B are the sums of the positive and of the negative contributions, with the part of the bias of that sign.

    Source: Bach et al. (2015), equation 60.
    """

    alpha: float = 2.0
    beta: float = 1.0
    stabilizer: float = 1e-6

    groups: ClassVar = AFFINE

    def __post_init__(self) -> None:
        require_stabilizer("alpha", self.alpha)
        require_stabilizer("beta", self.beta)
        require_stabilizer("stabilizer", self.stabilizer)
        if abs(self.alpha - self.beta - 1) > 1e-9:
            raise RuleError(
                f"alpha - beta has to be 1, got {self.alpha} - {self.beta}; take alpha=2, beta=1 or alpha=1, beta=0."
            )

    def __call__(self, operation: Operation) -> Tensor:
        affine = operation.affine()
        z = affine.value()
        fixed = operation.constant(z)
        positive, negative = _parts(affine, lambda w: w.clamp(min=0), lambda w: w.clamp(max=0), self.beta != 0)
        moving = positive * operation.constant(self.alpha * ratio(fixed, operation.constant(positive), self.stabilizer))
        if self.beta:
            share = ratio(fixed, operation.constant(negative), self.stabilizer)
            moving = moving - negative * operation.constant(self.beta * share)
        return operation.same_value(z, moving)


@dataclass(frozen=True)
class ZPlus(AlphaBeta):
    """The z+ rule: positive contributions only, AlphaBeta(1, 0).

    Source: Montavon et al., "Explaining Nonlinear Classification Decisions with Deep Taylor Decomposition" (2017).
    """

    alpha: float = 1.0
    beta: float = 0.0


def _parts(affine: Affine, up: Any, down: Any, both: bool = True) -> tuple[Tensor, Tensor]:
    """Two affine maps: `up` of the weights on x+ and `down` of them on x- with `up` of the bias, and the other way round."""
    x, weight, bias = affine.x, affine.weight, affine.bias
    up_w, down_w = up(weight), down(weight)
    up_b, down_b = (None, None) if bias is None else (up(bias), down(bias))
    if affine.operation.nonnegative:
        return affine.apply(x, up_w, up_b), affine.apply(x, down_w, down_b) if both else x
    plus, minus = x.clamp(min=0), x.clamp(max=0)
    first = affine.apply(plus, up_w, up_b) + affine.apply(minus, down_w)
    return first, affine.apply(plus, down_w, down_b) + affine.apply(minus, up_w) if both else first
