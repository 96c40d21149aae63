"""The rescale rule of DeepLIFT: differences from a reference run, shared so that their sum is exact.

Written with surrogates: tensors with their own value, whose derivative is the multiplier of DeepLIFT. Each of the functions
below takes values with their references and returns such a tensor, so that they can be chained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...core.checks import require_number
from ...core.errors import RuleError
from ...core.forward_mode import push_forward
from ...core.kinds import bias_position, is_elementwise
from ...core.rules import Operation, Rule, Rules, on

_LINEAR = frozenset({"sum", "average", "scale", "shape", "linear", "convolution", "batch_norm", "embedding"})
_SELECTING = ("max_pool", "adaptive_max_pool", "amax", "amin")


class Reference(NamedTuple):
    """What an operation did in the reference run: its active arguments by position, and its result."""

    operands: dict
    result: Any


class _Calculus(NamedTuple):
    """The surrogates; `constant` makes a constant of the derivative, differences up to `threshold` have the gradient."""

    constant: Callable[[Tensor], Tensor]
    threshold: float

    def same_value(self, value: Tensor, moving: Tensor) -> Tensor:
        return self.constant(value) + (moving - self.constant(moving))

    def elementwise(self, f: Callable[[Tensor], Tensor], x: Tensor, x0: Tensor) -> Tensor:
        y, fixed = f(x), self.constant(x)
        difference = torch.where(fixed.isfinite() & x0.isfinite(), fixed - x0, torch.zeros_like(fixed))
        tiny = difference.abs() < self.threshold
        slope = (self.constant(y) - f(x0)) / torch.where(tiny, torch.ones_like(difference), difference)
        slope = torch.where(tiny, torch.zeros_like(slope), slope)
        return self.same_value(y, torch.where(tiny, y, x * self.constant(slope)))

    def bilinear(self, f: Callable[[Tensor, Tensor], Tensor], a: Tensor, a0: Tensor, b: Tensor, b0: Tensor) -> Tensor:
        """f(a, b) - f(a0, b0) = f(a - a0, (b + b0) / 2) + f((a + a0) / 2, b - b0)."""
        middle_a, middle_b = (self.constant(a) + a0) / 2, (self.constant(b) + b0) / 2
        return self.same_value(f(a, b), f(a, self.constant(middle_b)) + f(self.constant(middle_a), b))

    def product(self, a: Tensor, a0: Tensor, b: Tensor, b0: Tensor) -> Tensor:
        return self.bilinear(torch.mul, a, a0, b, b0)

    def softmax(self, x: Tensor, x0: Tensor, dim: int, log: bool | None = False) -> Tensor:
        """The softmax; its logarithm; with `log=None` the logarithm of the sum of exponentials."""
        top = torch.maximum(self.constant(x), x0).amax(dim, keepdim=True)
        shift = torch.where(top.isfinite(), top, torch.zeros_like(top))
        powers, powers0 = self.elementwise(torch.exp, x - shift, x0 - shift), (x0 - shift).exp()
        total, total0 = powers.sum(dim, keepdim=True), powers0.sum(dim, keepdim=True)
        if log is False:
            inverse = self.elementwise(torch.reciprocal, total, total0)
            return self.product(powers, powers0, inverse, total0.reciprocal())
        logarithm = self.elementwise(torch.log, total, total0)
        return logarithm + shift if log is None else x - shift - logarithm

    def selection(self, f: Callable[[Tensor], Tensor], x: Tensor, x0: Tensor, sign: int) -> Tensor:
        """A maximum (or minimum, `sign` -1) over some elements, where x and x0 may have it at different ones.

        What the maximum exceeds its reference by is due to the element where x has it, what it falls short by to the element
        where x0 has it.
        """
        fixed = self.constant(x)
        y, y_there = push_forward(f, (fixed,), (x0,))  # x0 where x has its maximum
        y0, y0_there = push_forward(f, (x0,), (fixed,))
        top = sign * torch.maximum(sign * y, sign * y0)
        own = self._share(top - y0, y - y_there, 1.0)
        other = self._share(y - top, y0_there - y0, 0.0)
        # The derivative of f at x0 is the selection that x0 makes.
        return self.same_value(f(x), f(x) * self.constant(own) + f(x0 + (x - fixed)) * self.constant(other))

    def _share(self, numerator: Tensor, denominator: Tensor, otherwise: float) -> Tensor:
        tiny = denominator.abs() < self.threshold
        share = numerator / torch.where(tiny, torch.ones_like(denominator), denominator)
        return torch.where(tiny, torch.full_like(share, otherwise), share)


@dataclass(frozen=True)
class Rescale(Rule):
    """The rescale rule of DeepLIFT: the multiplier of a function is the ratio of the differences from a reference.

        m = (f(x) - f(x0)) / (x - x0)         its derivative at x where |x - x0| < threshold
        d(a b) = (a + a0) / 2 db + (b + b0) / 2 da

    Elementwise functions of one operand, products and quotients, matrix products, softmax, attention, maxima and pooling,
    norms: for all of these the multipliers times the differences of the operands sum to the difference of the result exactly.
    Softmax, attention and norms are written out as products and functions of one number. Linear operations keep their gradient.

    `centred_softmax` is what Shrikumar et al. propose for the last softmax of a classifier, and captum does for every
    `nn.Softmax`: the ratios of differences less their mean along the axis. Its sum is not exact.

    Source: Shrikumar, Greenside, Kundaje, "Learning Important Features Through Propagating Activation Differences" (2017),
    sections 3.5.2 and 3.6.
    """

    threshold: float = 1e-10
    centred_softmax: bool = False

    groups: ClassVar = None
    keeps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_number("threshold", self.threshold)

    def keep(self, operation: Operation) -> Reference | None:
        if operation.group in _LINEAR and not _is_fused_product(operation):
            return None
        return Reference({p: operation.argument(p) for p in operation.active}, operation.evaluate())

    def __call__(self, operation: Operation) -> Any:
        if operation.group in _LINEAR:
            if _is_fused_product(operation):
                raise no_rule(operation)
            return operation.evaluate()
        if operation.reference is None:
            raise RuleError(f"the rule {self} at {operation.site} needs a reference run; use tdhook.attribution.deep_lift.")
        return self._surrogate(operation, _Calculus(operation.constant, self.threshold))

    def _surrogate(self, operation: Operation, calculus: _Calculus) -> Any:
        name, group, active = operation.name, operation.group, operation.active
        if group == "softmax":
            return self._softmax(operation, calculus)
        if group == "attention":
            return _attention(operation, calculus)
        if group == "normalization":
            return _normalization(operation, calculus)
        if group == "maximum" and not is_elementwise(name) and name not in ("maximum", "minimum") and not _of_two(operation):
            return _selection(operation, calculus)
        moving = [p for p in active if p != bias_position(name, operation.args, operation.kwargs)]
        if len(moving) == 1 and (group in ("activation", "maximum") or is_elementwise(name)):
            at, reference = moving[0], operation.reference.operands[moving[0]]
            return calculus.elementwise(lambda x: operation.evaluate({at: x}), operation.argument(at), reference)
        if len(moving) != 2 or any(not isinstance(operation.argument(p), Tensor) for p in moving):
            raise no_rule(operation)
        a, b = (operation.argument(p) for p in moving)
        a0, b0 = (operation.reference.operands[p] for p in moving)
        if group == "maximum":
            sign = 1 if name.startswith("max") else -1
            apart = calculus.elementwise(torch.abs, a - b, a0 - b0)
            return calculus.same_value(operation.evaluate(), (a + b + sign * apart) / 2)
        if name in ("div", "rdiv"):
            over, under = (0, 1) if name == "div" else (1, 0)
            top, top0 = (a, a0) if moving[0] == over else (b, b0)
            bottom, bottom0 = (b, b0) if moving[1] == under else (a, a0)
            inverse = calculus.elementwise(torch.reciprocal, bottom, bottom0)
            moved = calculus.product(top, top0, inverse, bottom0.reciprocal())
            return calculus.same_value(operation.evaluate(), moved)
        if group not in ("product", "matmul"):
            raise no_rule(operation)
        once = _bias_of(operation)

        def multiplied(first: Tensor, second: Tensor) -> Tensor:
            return operation.evaluate({moving[0]: first, moving[1]: second, **once})

        moved = calculus.bilinear(multiplied, a, a0, b, b0)
        # A bias that depends on the input is added to both halves.
        return moved if not once else calculus.same_value(operation.evaluate(), moved + operation.evaluate() - multiplied(a, b))

    def _softmax(self, operation: Operation, calculus: _Calculus) -> Tensor:
        name, x = operation.name, operation.x
        x0 = operation.reference.operands[operation.active[0]]
        given = dict(zip(("input", "dim"), operation.args)) | dict(operation.kwargs)
        dim: Any = given.get("dim")
        known = name in ("softmax", "log_softmax", "softmin", "logsumexp") and isinstance(dim, int)
        if not known or len(operation.active) > 1:
            raise no_rule(operation)
        y, sign = operation.evaluate(), -1 if name == "softmin" else 1
        if self.centred_softmax and name == "softmax":
            return calculus.same_value(y, _centred(calculus, x, x0, y, operation.reference.result, dim))
        log = {"log_softmax": True, "logsumexp": None}.get(name, False)
        moving = calculus.softmax(sign * x, sign * x0, dim, log)
        return calculus.same_value(y, moving.reshape(y.shape))


def no_rule(operation: Operation) -> RuleError:
    return RuleError(
        f"DeepLIFT has no rule for {operation.name!r} at {operation.site}; give it the gradient, whose sum is not exact: "
        f"rule=[on({operation.name!r}, Gradient()), rescale()]."
    )


def _is_fused_product(operation: Operation) -> bool:
    """An addition with a product of two operands in it."""
    return operation.name in ("addcmul", "lerp", "addcdiv") and bool({*operation.active} - {0, "input"})


def _of_two(operation: Operation) -> bool:
    """`torch.max` of two tensors."""
    return operation.name in ("max", "min") and any(
        isinstance(v, Tensor) for v in (*operation.args[1:], operation.kwargs.get("other"))
    )


def _bias_of(operation: Operation) -> dict:
    """The bias of a product as a constant, if it depends on the input."""
    at = bias_position(operation.name, operation.args, operation.kwargs)
    return {at: operation.constant(operation.argument(at))} if at is not None and at in operation.active else {}


def _centred(calculus: _Calculus, x: Tensor, x0: Tensor, y: Tensor, y0: Tensor, dim: int) -> Tensor:
    difference = calculus.constant(x) - x0
    tiny = difference.abs() < calculus.threshold
    ratio = (calculus.constant(y) - y0) / torch.where(tiny, torch.ones_like(difference), difference)
    centred = x - x.mean(dim, keepdim=True)
    # The transposed of taking the mean off takes the mean of the ratios off.
    return torch.where(tiny, y, centred * calculus.constant(ratio))


def _selection(operation: Operation, calculus: _Calculus) -> Any:
    name, at = operation.name, operation.active[0]
    if not (name.startswith(_SELECTING) or name in ("max", "min")) or len(operation.active) > 1:
        raise no_rule(operation)

    def values(x: Tensor) -> Tensor:
        found = operation.evaluate({at: x})
        return found if isinstance(found, Tensor) else found[0]

    sign = -1 if name in ("amin", "min") else 1
    moved = calculus.selection(values, operation.x, operation.reference.operands[at], sign)
    output = operation.evaluate()
    return moved if isinstance(output, Tensor) else type(output)((moved, *output[1:]))


def _attention(operation: Operation, calculus: _Calculus) -> Tensor:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    places: dict[str, Any] = {name: i if i < len(operation.args) else name for i, name in enumerate(names)}
    given = dict(zip(names, operation.args)) | dict(operation.kwargs)
    if given.get("dropout_p"):
        raise RuleError(f"{operation.site} drops values; call model.eval() first.")
    if places["attn_mask"] in operation.active:
        raise no_rule(operation)
    now = {name: given[name] for name in names[:3]}
    then = {name: operation.reference.operands.get(places[name], given[name]) for name in names[:3]}
    if given.get("enable_gqa"):
        times = now["query"].shape[-3] // now["key"].shape[-3]
        for each in (now, then):
            each.update({name: each[name].repeat_interleave(times, -3) for name in ("key", "value")})
    scale = given.get("scale") or now["query"].shape[-1] ** -0.5
    scores = calculus.bilinear(lambda q, k: q @ k.mT, now["query"] * scale, then["query"] * scale, now["key"], then["key"])
    scores0 = (then["query"] * scale) @ then["key"].mT
    mask = given.get("attn_mask")
    if given.get("is_causal"):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores, scores0 = (
            s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask for s in (scores, scores0)
        )
    pattern = calculus.softmax(scores, scores0, -1)
    mixed = calculus.bilinear(torch.matmul, pattern, scores0.softmax(-1), now["value"], then["value"])
    return calculus.same_value(operation.evaluate(), mixed)


def _normalization(operation: Operation, calculus: _Calculus) -> Tensor:
    name, x = operation.name, operation.x
    if name not in ("layer_norm", "rms_norm", "group_norm") or len(operation.active) > 1:
        raise no_rule(operation)
    second = "num_groups" if name == "group_norm" else "normalized_shape"
    order = ("input", second, "weight", "eps") if name == "rms_norm" else ("input", second, "weight", "bias", "eps")
    given = dict(zip(order, operation.args)) | dict(operation.kwargs)
    weight, epsilon = given.get("weight"), given.get("eps")
    if epsilon is None:
        epsilon = torch.finfo(x.dtype).eps if name == "rms_norm" else 1e-5

    def centred(value: Tensor) -> Tensor:
        if name == "group_norm":
            value = value.unflatten(1, (given["num_groups"], -1)).flatten(2)
        return value if name == "rms_norm" else value - value.mean(axes, keepdim=True)

    axes = (-1,) if name == "group_norm" else tuple(range(-len(given["normalized_shape"]), 0))
    c, c0 = centred(x), centred(operation.reference.operands[operation.active[0]])
    variance = calculus.product(c, c0, c, c0).mean(axes, keepdim=True) + epsilon
    variance0 = c0.square().mean(axes, keepdim=True) + epsilon
    scale = calculus.elementwise(torch.rsqrt, variance, variance0)
    normed = calculus.product(c, c0, scale, variance0.rsqrt()).reshape(x.shape)
    if weight is not None:
        normed = normed * (weight.reshape(-1, *[1] * (x.ndim - 2)) if name == "group_norm" else weight)
    return calculus.same_value(operation.evaluate(), normed)


def rescale(threshold: float = 1e-10, centred_softmax: bool = False) -> Rules:
    """The rescale rule for everything; see `Rescale`."""
    return Rules((on("*", Rescale(threshold, centred_softmax)),))
