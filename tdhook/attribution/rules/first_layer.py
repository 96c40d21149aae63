"""Rules for the layer that reads the input. They share relevance without regard to the value of the operand, so that a black
pixel gets some: where the operand is an input of the model, its cotangent is the relevance itself, not to be multiplied by it.
Inside a model the relevance is divided by the operand instead, and what would go to an operand of 0 is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...core.errors import RuleError
from ...core.rules import Affine, Operation, Rule
from ...core.structure import describe
from .affine import AFFINE
from .stabilizers import ratio, require_stabilizer, stabilized

Part = tuple[Tensor, Tensor, float]  # what the operand is replaced by, the weights, and a sign


@dataclass(frozen=True)
class _FirstLayer(Rule):
    stabilizer: float = 1e-6

    groups: ClassVar = AFFINE
    absolute: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_stabilizer("stabilizer", self.stabilizer)

    def parts(self, affine: Affine) -> tuple[list[Part], Tensor | None]:
        """The parts of the denominator, and the bias in it."""
        raise NotImplementedError

    def __call__(self, operation: Operation) -> Tensor:
        affine = operation.affine()
        z, x = affine.value(), affine.x
        parts, bias = self.parts(affine)
        total = _sum(sign * affine.apply(a, weight) for a, weight, sign in parts)
        if bias is not None:
            total = total + affine.apply(torch.zeros_like(x), torch.zeros_like(affine.weight), bias)
        share = operation.constant(ratio(operation.constant(z), operation.constant(total), self.stabilizer))
        shift = x - operation.constant(x)
        at = operation.constant(x)
        inverse = operation.constant(
            torch.where(at == 0, torch.zeros_like(at), 1 / stabilized(at, self.stabilizer).to(x.dtype))
        )
        shift = shift if operation.of_input else shift * inverse
        moving = _sum(
            sign * share * affine.apply(operation.constant(a) * shift, operation.constant(weight)) for a, weight, sign in parts
        )
        return operation.constant(z) + moving


@dataclass(frozen=True)
class ZBox(_FirstLayer):
    """The z-box rule, for inputs that lie between bounds l and h.

        R_i = sum_j (x_i W_ji - l_i W+_ji - h_i W-_ji) / sum_i (...) R_j

    The bounds are numbers, sequences of one for each channel (the axis after the batch), or tensors that broadcast to the
    operand.

    Source: Montavon et al. (2017).
    """

    low: float | Sequence[float] | Tensor | None = None
    high: float | Sequence[float] | Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("low", "high"):
            bound = getattr(self, name)
            if bound is None:
                raise RuleError(f"ZBox needs {name}, the bound of the inputs, as in ZBox(low=-3.0, high=3.0); got None.")
            if isinstance(bound, Sequence) and not isinstance(bound, tuple):
                object.__setattr__(self, name, tuple(bound))
            if not isinstance(bound, (int, float, Sequence, Tensor)) or isinstance(bound, str):
                raise RuleError(f"{name} of ZBox is {describe(bound)}; give a number, one for each channel, or a tensor.")
        if isinstance(self.low, (int, float)) and isinstance(self.high, (int, float)) and self.low > self.high:
            raise RuleError(f"low of ZBox is {self.low}, which is above high, {self.high}.")

    def parts(self, affine: Affine) -> tuple[list[Part], Tensor | None]:
        x, weight = affine.x, affine.weight
        low, high = _bound(self.low, x, affine), _bound(self.high, x, affine)
        return [(x, weight, 1.0), (low, weight.clamp(min=0), -1.0), (high, weight.clamp(max=0), -1.0)], None

    def __hash__(self) -> int:
        return hash((type(self), self.stabilizer, *(id(b) if isinstance(b, Tensor) else b for b in (self.low, self.high))))

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and hash(other) == hash(self)


@dataclass(frozen=True)
class WSquare(_FirstLayer):
    """The w^2 rule, for inputs of any value.

        R_i = sum_j W_ji^2 / (sum_i W_ji^2 + b_j^2) R_j

    Source: Montavon et al. (2017).
    """

    def parts(self, affine: Affine) -> tuple[list[Part], Tensor | None]:
        bias = affine.bias
        return [(torch.ones_like(affine.x), affine.weight.square(), 1.0)], None if bias is None else bias.square()


@dataclass(frozen=True)
class Flat(_FirstLayer):
    """The flat rule: the same to each operand, whatever the weights.

        R_i = sum_j R_j / (how many operands j reads)

    Source: Lapuschkin et al., "Unmasking Clever Hans Predictors" (2019).
    """

    def parts(self, affine: Affine) -> tuple[list[Part], Tensor | None]:
        return [(torch.ones_like(affine.x), torch.ones_like(affine.weight), 1.0)], None


def _sum(terms: Iterable[Tensor]) -> Tensor:
    first, *others = terms
    for term in others:
        first = first + term
    return first


def _bound(bound: float | Sequence[float] | Tensor | None, x: Tensor, affine: Affine) -> Tensor:
    if isinstance(bound, Sequence):
        spatial = max(0, affine.weight.ndim - 2)
        if x.ndim <= spatial or x.shape[x.ndim - spatial - 1] != len(bound):
            raise RuleError(f"ZBox has {len(bound)} bounds, one for each channel, but its operand is {describe(x)}.")
        bound = torch.tensor(bound, dtype=x.dtype, device=x.device).reshape(-1, *[1] * spatial)
    if not isinstance(bound, Tensor):
        return torch.full_like(x, bound)  # type: ignore[arg-type]
    while bound.ndim > x.ndim and bound.shape[0] == 1:
        bound = bound[0]  # the batch axis of bounds, which an operand under vmap does not have
    if bound.ndim > x.ndim or any(b not in (1, n) for b, n in zip(reversed(bound.shape), reversed(x.shape))):
        raise RuleError(f"a bound of ZBox is {describe(bound)}, which does not broadcast to its operand, {describe(x)}.")
    return bound.to(x).expand(x.shape)
