"""Rules for single operations: activations, products, what is cut off and what is left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from ...core.checks import require_number
from ...core.derivatives import edited_cotangent
from ...core.rules import Operation, Rule
from .stabilizers import require_stabilizer, stabilized

# The derivative at 0, where f(x) / x has no value, of the activations with f(0) = 0.
_SLOPES_AT_ZERO = {
    **dict.fromkeys(("hardswish", "silu", "gelu"), 0.5),
    **dict.fromkeys(("relu6", "hardshrink", "softshrink", "tanhshrink"), 0.0),
    "mish": 0.6,
}


@dataclass(frozen=True)
class Gradient(Rule):
    """The plain gradient, on purpose. It is also what an operation without a rule gets."""

    def __call__(self, operation: Operation) -> Any:
        return operation.evaluate()


@dataclass(frozen=True)
class Stop(Rule):
    """No relevance goes through: the value is a constant. Given to the scale of a norm or to an attention pattern, it makes the
    rest of the expression linear.

    Source: the LN-rule and AH-rule of Ali et al., "XAI for Transformers: Better Explanations through Conservative Propagation"
    (2022).
    """

    stops: ClassVar[bool] = True

    def __call__(self, operation: Operation) -> Any:
        return pytree.tree_map_only(Tensor, operation.constant, operation.evaluate())


@dataclass(frozen=True)
class Identity(Rule):
    """The identity rule for elementwise functions: all relevance passes, R_in = R_out.

        dy / dx = f(x) / x

    Where f(0) is not 0 (sigmoid, softplus, a batch norm) that has a pole, which the stabilizer rounds off; an operand that is
    exactly 0 gets nothing there.

    Source: Achtibat et al., "AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for Transformers" (2024), section 3.
    """

    stabilizer: float = 1e-9

    groups: ClassVar = frozenset({"activation", "function", "batch_norm"})

    def __post_init__(self) -> None:
        require_stabilizer("stabilizer", self.stabilizer)

    def __call__(self, operation: Operation) -> Tensor:
        y = operation.evaluate()
        if operation.name in ("relu", "leaky_relu", "prelu"):
            return y  # linear on either side of 0: the gradient is the same
        x = operation.constant(operation.x)
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        if operation.name == "batch_norm" or exact.dtype == y.dtype:  # its statistics may not be given in another type
            value = operation.constant(y).to(exact.dtype)
        else:
            value = operation.constant(operation.evaluate({operation.active[0]: exact}))
        zero = torch.zeros_like(exact)
        slope: Any = _SLOPES_AT_ZERO.get(operation.name, 1.0)
        if operation.name == "module":
            below = torch.full([1] * exact.ndim, -1e-4, dtype=exact.dtype, device=exact.device)
            slope = operation.constant(operation.evaluate({operation.active[0]: below})) / below
        # f(0) = 0 needs no stabilizer: the ratio is as exact as f is.
        pole = torch.where(value.abs() > 2 * exact.abs(), stabilized(exact, self.stabilizer), exact)
        at_zero = torch.where(value == 0, zero + slope, zero)
        coefficient = torch.where(exact == 0, at_zero, value / torch.where(pole == 0, torch.ones_like(pole), pole))
        moving = (operation.x - x) * operation.constant(coefficient.to(x.dtype))
        return operation.constant(y) + moving


class Pass(Identity):
    """The pass rule: what comes in goes through an activation or a batch norm unchanged. In gradient space it is `Identity`."""


@dataclass(frozen=True)
class Uniform(Rule):
    """The uniform rule for products: each of n operands that depend on the input gets 1 / n of the relevance.

        d(a b) = (b da + a db) / 2

    A product with something that does not depend on the input is left whole. The rule depends on the order of the factors:
    (a b) c is not a (b c).

    Source: Achtibat et al. (2024), proposition 3.3; the half-rule of Rezaei Jafari et al., "RelP: Faithful and Efficient
    Circuit Discovery via Relevance Patching" (2025).
    """

    groups: ClassVar = frozenset({"matmul", "product"})

    def __call__(self, operation: Operation) -> Tensor:
        value = operation.evaluate()
        count = max(2, len(operation.active))
        if operation.name == "pow":
            count = (*operation.args, *operation.kwargs.values())[-1]
        elif operation.name == "prod":
            count = max(1, operation.x.numel() // max(1, value.numel()))
        return operation.scaled(value, 1 / count)


@dataclass(frozen=True)
class FrozenGate(Uniform):
    """Gates are constants: in a product all relevance goes to the factor that does not come out of an activation; of a sigmoid
    and another activation the sigmoid is the gate. Without a gate it is `Uniform`.

    Source: Arras et al., "Explaining and Interpreting LSTMs" (2019); Ali et al. (2022).
    """

    groups: ClassVar = frozenset({"product"})

    def __call__(self, operation: Operation) -> Tensor:
        if not operation.gates:
            return super().__call__(operation)
        return operation.evaluate({gate: operation.constant(operation.argument(gate)) for gate in operation.gates})


@dataclass(frozen=True)
class Attention(Rule):
    """Shares for the operands of fused attention softmax(q k) v.

        dq, dk, dv times `query`, `key`, `value`

    The default is what `Uniform` on both products gives: 1/4, 1/4, 1/2. `FrozenPattern` is 0, 0, 1. What an operand would get
    that does not depend on the input goes to the one that it is multiplied by, and a mask that does gets what the scores get.

    Source: Achtibat et al. (2024); frozen patterns: Ali et al. (2022).
    """

    query: float = 0.25
    key: float = 0.25
    value: float = 0.5

    groups: ClassVar = frozenset({"attention"})

    def __post_init__(self) -> None:
        for name in ("query", "key", "value"):
            require_number(name, getattr(self, name))

    def __call__(self, operation: Operation) -> Tensor:
        places = {i if i < len(operation.args) else name: name for i, name in enumerate(("query", "key", "value", "attn_mask"))}
        active = {place: places[place] for place in operation.active if place in places}
        shares = self._shares(set(active.values()))
        replaced = {}
        for place, name in active.items():
            given, share = operation.argument(place), shares[name]
            fixed = operation.constant(given)
            replaced[place] = fixed if share == 0 else given if share == 1 else fixed + (given - fixed) * share
        return operation.evaluate(replaced)

    def _shares(self, active: set[str]) -> dict[str, float]:
        scores, total = self.query + self.key, self.query + self.key + self.value
        if not active & {"query", "key", "attn_mask"}:
            return {"value": total}
        more = 1.0 if "value" in active or not scores else total / scores
        both = {"query", "key"} <= active
        shares = {"query": self.query if both else scores, "key": self.key if both else scores, "attn_mask": scores}
        return {"value": self.value, **{name: share * more for name, share in shares.items()}}


@dataclass(frozen=True)
class FrozenPattern(Attention):
    """The attention pattern is a constant (AH-rule, CP-LRP): all relevance goes to the values.

    Source: Ali et al. (2022).
    """

    query: float = 0.0
    key: float = 0.0
    value: float = 1.0


@dataclass(frozen=True)
class Guided(Rule):
    """The guided ReLU: cotangents pass where they and the operand are positive.

        dy / dx g = 1[x > 0] max(g, 0)

    Not linear in the cotangent, so its result is no relevance. Compiled, it cannot be differentiated by `vmap(grad(...))`.

    Source: Springenberg et al., "Striving for Simplicity" (2014).
    """

    groups: ClassVar = frozenset({"activation"})

    def __call__(self, operation: Operation) -> Tensor:
        return edited_cotangent(operation.evaluate(), torch.relu)


@dataclass(frozen=True)
class Deconv(Rule):
    """The ReLU of a deconvnet: positive cotangents pass, whatever the operand.

        dy / dx g = max(g, 0)

    Source: Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks" (2014).
    """

    groups: ClassVar = frozenset({"activation"})

    def __call__(self, operation: Operation) -> Tensor:
        return operation.same_value(operation.evaluate(), edited_cotangent(operation.x, torch.relu))


@dataclass(frozen=True)
class BetaSmooth(Rule):
    """The ReLU with the derivatives, also the second, of softplus(beta x) / beta.

    Source: Dombrowski et al., "Explanations Can Be Manipulated and Geometry Is to Blame" (2019).
    """

    beta: float = 10.0

    groups: ClassVar = frozenset({"activation"})
    smooth: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_number("beta", self.beta, strict=True)

    def __call__(self, operation: Operation) -> Tensor:
        return operation.same_value(operation.evaluate(), F.softplus(operation.x, beta=self.beta))
