"""The RevealCancel rule of DeepLIFT: positive and negative contributions go through a function apart.

The parts of a difference are carried beside the value as two more tensors, noted on it: their values are the parts, and their
derivatives say how these are made of the parts before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp
from torch.utils import _pytree as pytree

from ...core.compat import is_compiling
from ...core.errors import RuleError
from ...core.kinds import is_elementwise
from ...core.rules import Operation, Rules, on
from ...core.scope import note, noted
from .deep_lift import Reference, Rescale

Parts = tuple[Tensor, Tensor]  # the positive and the negative part of a difference

_CARRIED = frozenset({"shape", "scale", "average", "sum", "batch_norm"})
_AFFINE = frozenset({"linear", "convolution"})


@dataclass(frozen=True)
class RevealCancel(Rescale):
    """The RevealCancel rule: contributions of either sign have multipliers of their own, so that they do not cancel unseen.

        y+ = (f(x0 + x+) - f(x0)) / 2 + (f(x0 + x+ + x-) - f(x0 + x-)) / 2,    y- likewise;     m+ = y+ / x+,  m- = y- / x-

    A linear layer or convolution makes the parts x+ and x- of what it returns: the sums of the positive and of the negative
    w (x - x0). Elementwise functions change them as above. Selections, averages, sums, batch norms and products with constants
    hand them on. Elsewhere (inputs, sites, what max pooling returns) the difference as a whole is the part of its sign, as in
    the rescale rule. For products, softmax, norms and attention there is no such rule. It does not compile.

    Source: Shrikumar et al. (2017), sections 3.5.1 and 3.5.3.
    """

    def keep(self, operation: Operation) -> Reference | None:
        if operation.name == "setitem":
            return None
        if operation.group in _CARRIED | _AFFINE:
            return Reference({p: operation.argument(p) for p in operation.active}, None)
        return super().keep(operation)

    def __call__(self, operation: Operation) -> Any:
        if is_compiling():
            raise RuleError("RevealCancel notes parts on tensors, which compiled code cannot; use the rescale rule.")
        if operation.group in _AFFINE:
            return _affine(operation)
        if operation.group in _CARRIED:
            output = super().__call__(operation)
            if operation.name != "setitem":
                return _carried(operation, output)
            note(operation.args[0], None)
            return output
        if operation.group == "embedding" or (operation.group == "maximum" and len(operation.active) == 1):
            return super().__call__(operation)
        if len(operation.active) != 1 or not (operation.group == "activation" or is_elementwise(operation.name)):
            raise RuleError(
                f"RevealCancel has no rule for {operation.name!r} at {operation.site}: it is for affine maps, elementwise "
                "functions, sums, pooling and rearrangements; use the rescale rule for it: "
                f"rule=[on({operation.name!r}, Rescale()), on('*', RevealCancel())]."
            )
        return self._elementwise(operation)

    def _elementwise(self, operation: Operation) -> Tensor:
        at, constant = operation.active[0], operation.constant
        x0, y = operation.reference.operands[at], operation.evaluate()

        def f(x: Tensor) -> Tensor:
            return operation.evaluate({at: x})

        parts = _parts(operation.x, x0, constant)
        plus, minus = (constant(part) for part in parts)
        y0, with_plus, with_minus = f(x0), f(x0 + plus), f(x0 + minus)
        up = (with_plus - y0 + constant(y) - with_minus) / 2
        down = (with_minus - y0 + constant(y) - with_plus) / 2
        fixed = constant(operation.x)
        value, pull = vjp(f, fixed)[:2]
        (slope,) = pull(torch.ones_like(value))
        moved = tuple(
            part * constant(torch.where(size.abs() < self.threshold, slope, change / _nonzero(size, self.threshold)))
            for part, size, change in zip(parts, (plus, minus), (up, down))
        )
        total = moved[0] + moved[1]
        return note(constant(y) + (total - constant(total)), moved)


def _nonzero(size: Tensor, threshold: float) -> Tensor:
    return torch.where(size.abs() < threshold, torch.ones_like(size), size)


def _parts(x: Tensor, x0: Tensor, constant: Callable[[Tensor], Tensor]) -> Parts:
    """The parts that are noted on a value, otherwise its difference by sign."""
    found = noted(x)
    return _by_sign(x - x0, constant) if found is None else found


def _by_sign(difference: Tensor, constant: Callable[[Tensor], Tensor]) -> Parts:
    positive = constant(difference) > 0
    zero = torch.zeros_like(difference)
    return torch.where(positive, difference, zero), torch.where(positive, zero, difference)


def _affine(operation: Operation) -> Tensor:
    affine, constant = operation.affine(), operation.constant
    difference = affine.x - operation.reference.operands[affine.x_at]
    fixed = constant(difference)
    # Where nothing changes, half of the weight counts for either part.
    up = difference * ((fixed > 0).to(fixed) + (fixed == 0).to(fixed) / 2)
    down = difference - up
    plus_w, minus_w = affine.weight.clamp(min=0), affine.weight.clamp(max=0)
    plus = affine.apply(up, plus_w) + affine.apply(down, minus_w)
    minus = affine.apply(up, minus_w) + affine.apply(down, plus_w)
    return note(affine.value(), (plus, minus))


def _carried(operation: Operation, output: Any) -> Any:
    """The parts of what a linear operation without mixing returns: each operand's parts through it, by sign."""
    leaves = pytree.tree_flatten(output)[0]
    found: list[Parts | None] = [None] * len(leaves)
    for position in operation.active:
        now, spec = pytree.tree_flatten(operation.argument(position))
        before = pytree.tree_flatten(operation.reference.operands[position])[0]
        parts = [_parts(x, x0, operation.constant) if _is_float(x) else (x, x) for x, x0 in zip(now, before)]
        still = [x0 - x0 if _is_float(x0) else x0 for x0 in before]
        nothing = _replaced(operation, position, still, spec)
        for part in zip(*parts):
            moved = _replaced(operation, position, part, spec)
            for i, (leaf, with_part, without) in enumerate(zip(leaves, moved, nothing)):
                if _is_float(leaf):
                    plus, minus = _by_sign(with_part - without, operation.constant)
                    known = found[i]
                    found[i] = (plus, minus) if known is None else (known[0] + plus, known[1] + minus)
    for leaf, total in zip(leaves, found):
        if total is not None:
            note(leaf, total)
    return output


def _replaced(operation: Operation, position: Any, leaves: Any, spec: Any) -> list[Any]:
    return pytree.tree_flatten(operation.evaluate({position: pytree.tree_unflatten(list(leaves), spec)}))[0]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def reveal_cancel(threshold: float = 1e-10) -> Rules:
    """The RevealCancel rule for everything; see `RevealCancel`."""
    return Rules((on("*", RevealCancel(threshold)),))
