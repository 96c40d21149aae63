"""What a rule is: another backward for one operation with the same value, and the table that says which operation gets which.

Everything is in gradient space: a rule changes the derivative that an operation shows to reverse mode, and the relevance of any
value is the value times its cotangent, R = x * g. Sums, reshapes, skip connections and linear maps then need no rule at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import RuleError, did_you_mean
from .kinds import GROUPS, Position, bias_position, known_operations, plain_name, weight_position
from .sites import SiteLike
from .structure import describe


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation while the model runs, as a rule sees it.

    Attributes:
        name: as in sites, such as `"linear"`; `"module"` for a call of a whole module.
        site: its address: a `Site` where the table is looked up, a string where the rule is applied.
        group: one of `tdhook.core.kinds.GROUPS`.
        function, args, kwargs: the call that the model made.
        active: where among the arguments the operands stand that depend on the input: positions and names.
        of_input: the operand is an input of the model, or a selection or rearrangement of one.
        nonnegative: the operand is known to be: it comes out of a ReLU, say.
        gates: in a product, which of the active operands come out of an activation.
        reference: what a rule kept of this operation in a run on a baseline, if there was one.
        constant: a tensor as a constant of the derivative. Rules use it in place of `detach`, which would also hide it from a
            derivative of the relevance.
    """

    name: str
    site: Any
    group: str
    function: Callable
    args: tuple
    kwargs: Mapping[str, Any]
    active: tuple[Position, ...]
    of_input: bool = False
    nonnegative: bool = False
    gates: tuple[Position, ...] = ()
    reference: Any = None
    constant: Callable[[Tensor], Tensor] = Tensor.detach

    def argument(self, position: Position) -> Any:
        """The argument at a position or of a name."""
        return self.args[position] if isinstance(position, int) else self.kwargs[position]

    def evaluate(self, replaced: Mapping[Position, Any] | None = None) -> Any:
        """What the operation returns, with other values in place of some arguments."""
        replaced = replaced or {}
        args = [replaced.get(i, value) for i, value in enumerate(self.args)]
        return self.function(*args, **{name: replaced.get(name, value) for name, value in self.kwargs.items()})

    @property
    def x(self) -> Tensor:
        """The operand that depends on the input, where there is only one."""
        return self.argument(self.active[0])

    def same_value(self, value: Tensor, moving: Tensor) -> Tensor:
        """`value` bit for bit, with the derivative of `moving`."""
        return self.constant(value) + (moving - self.constant(moving))

    def scaled(self, value: Tensor, by: Tensor | float | Callable[[Tensor], Tensor]) -> Tensor:
        """`value` bit for bit, with its derivative times `by`, which may be a function of the value as a constant."""
        fixed = self.constant(value)
        # One pass over memory in each direction: on the way from the value to itself is nothing but the value.
        return torch.lerp(fixed, value, by(fixed) if callable(by) else self.constant(by) if isinstance(by, Tensor) else by)

    def affine(self) -> Affine:
        """The operation as an affine map of its only active operand. Raises `RuleError` for another group."""
        if self.group not in ("linear", "convolution"):
            raise RuleError(f"{self.site} is no affine map; this rule is for the groups linear and convolution.")
        bias_at = bias_position(self.name, self.args, self.kwargs)
        moving = [p for p in self.active if p != bias_at]
        weight_at = weight_position(self.name, moving[0], self.args, self.kwargs) if len(moving) == 1 else None
        if weight_at is None:
            raise RuleError(f"{self.site}: the operand and the weight cannot be told apart; write it as two products.")
        return Affine(self, moving[0], weight_at, bias_at)


@dataclass(frozen=True, eq=False)
class Affine:
    """An operation of the form z = W x + b: a linear layer, a convolution, a product with a parameter."""

    operation: Operation
    x_at: Position
    weight_at: Position
    bias_at: Position | None

    @property
    def x(self) -> Tensor:
        return self.operation.argument(self.x_at)

    @property
    def weight(self) -> Tensor:
        return self.operation.argument(self.weight_at)

    @property
    def bias(self) -> Tensor | None:
        """As it is added: `addmm(..., beta=2)` adds twice the bias."""
        bias = None if self.bias_at is None else self.operation.argument(self.bias_at)
        beta = self.operation.kwargs.get("beta", 1)
        return bias if bias is None or beta == 1 else bias * beta

    def value(self) -> Tensor:
        return self.operation.evaluate()

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The map with other operands; without a bias, unless one is given."""
        name, kwargs = self.operation.name, self.operation.kwargs
        if name in ("addmm", "addmv", "baddbmm", "addbmm"):
            first, second = (x, weight) if self._x_is_first() else (weight, x)
            product = torch.bmm(first, second).sum(0) if name == "addbmm" else torch.matmul(first, second)
            product = product * kwargs["alpha"] if kwargs.get("alpha", 1) != 1 else product
            return product if bias is None else product + bias
        replaced: dict[Position, Tensor | None] = {self.x_at: x, self.weight_at: weight}
        if self.bias_at is not None:
            replaced[self.bias_at] = bias
        result = self.operation.evaluate(replaced)
        return result if bias is None or self.bias_at is not None else result + bias

    def _x_is_first(self) -> bool:
        order = ("mat1", "batch1", "mat")
        return self.x_at == 1 or self.x_at in order


class Rule:
    """Another backward for an operation. Subclasses are frozen dataclasses and say how in `__call__`.

    Attributes:
        groups: which operations it makes sense for; None for any.
        stops: nothing flows back through the operation, so what it returns does not depend on the input for what follows.
        absolute: where the operand is an input of the model, the cotangent that arrives there is the relevance itself.
        smooth: second derivatives are meant to be those of what the rule returns, so that they are not refused.
        keeps: the rule compares with a run on a baseline: `keep` says what it wants of that.
    """

    groups: ClassVar[frozenset[str] | None] = None
    stops: ClassVar[bool] = False
    absolute: ClassVar[bool] = False
    smooth: ClassVar[bool] = False
    keeps: ClassVar[bool] = False

    def __call__(self, operation: Operation) -> Any:
        """The value of the operation, bit for bit (see `Operation.same_value`), with another derivative."""
        raise NotImplementedError

    def keep(self, operation: Operation) -> Any:
        """What the rule needs to know of the operation in a run on a baseline."""
        raise NotImplementedError


@dataclass(frozen=True)
class Entry:
    """One line of a table: a rule, and which operations it is for.

    Attributes:
        rule: what they get.
        operations: names (`"gelu"`) and groups (`"activation"`); None for all.
        sites: a pattern of operations (`"h.*.attn/matmul@1"`) or of modules, which stands for all operations in them and for
            the call of a module without parameters as a whole; None for everywhere.
        where: a condition on the `Operation` as it is traced, on fake tensors: its name, site, group, shapes.
        first: only the first operation that fits, in the order in which they run.
    """

    rule: Rule
    operations: frozenset[str] | None = None
    sites: SiteLike | None = None
    where: Callable[[Operation], bool] | None = None
    first: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule):
            raise RuleError(f"{describe(self.rule)} is no rule; give one of tdhook.attribution.rules, or a subclass of Rule.")
        for name in self.operations or ():
            if name not in GROUPS and name not in known_operations():
                raise RuleError(
                    f"unknown operation {name!r}; groups are {', '.join(GROUPS)}, and an operation has the name that "
                    f"tdhook.trace shows; a module is meant by on('*', rule, sites={name!r})."
                    + did_you_mean(name, (*GROUPS, *known_operations()))
                )
            groups = type(self.rule).groups
            if groups is not None and name in GROUPS and name not in groups:
                raise RuleError(f"{self.rule} is for {', '.join(sorted(groups))}, not for {name}.")

    def fits(self, operation: Operation) -> bool:
        """Whether the operation is meant, as far as the line itself can tell; sites and `first` are looked after elsewhere."""
        # A word that is both, such as "matmul", means the group.
        by_name = operation.name in {plain_name(name) for name in self.operations or () if name not in GROUPS}
        if self.operations is not None and not by_name and operation.group not in self.operations:
            return False
        groups = type(self.rule).groups
        if groups is not None and operation.group not in groups:
            if by_name:
                raise RuleError(
                    f"{self.rule} cannot be given to {operation.site}, which is of the group {operation.group!r}; it is for "
                    f"{', '.join(sorted(groups))}."
                )
            return False
        return self.where is None or bool(self.where(operation))


@dataclass(frozen=True)
class Rules:
    """A table of rules; the first line that fits an operation counts. `a + b` puts the lines of `a` first.

    Examples:
        >>> from tdhook.attribution.rules import Epsilon, Gamma, on
        >>> Rules((on("linear", Gamma(0.25), first=True), on("linear", Epsilon(1e-6))))
        Rules(
            first linear: Gamma(gamma=0.25, stabilizer=1e-06)
            linear: Epsilon(epsilon=1e-06)
        )
    """

    entries: tuple[Entry, ...] = field(default=())

    @staticmethod
    def of(rules: Any) -> Rules:
        """A table from a `Rules`, an `Entry`, a sequence of either, or a mapping from operations or site patterns to rules."""
        if isinstance(rules, Rules):
            return rules
        if isinstance(rules, Entry):
            return Rules((rules,))
        if isinstance(rules, Mapping):
            return Rules(tuple(_entry(key, rule) for key, rule in rules.items()))
        if isinstance(rules, Sequence) and not isinstance(rules, str):
            return Rules(tuple(entry for item in rules for entry in Rules.of(item).entries))
        raise RuleError(
            f"rules is {describe(rules)}; give a preset of tdhook.attribution.rules, or a mapping from operations or sites to "
            "rules, such as {'linear': Epsilon()}."
        )

    def __add__(self, other: Any) -> Rules:
        return Rules((*self.entries, *Rules.of(other).entries))

    def __radd__(self, other: Any) -> Rules:
        return Rules.of(other) + self

    def where(self, condition: Callable[[Operation], bool]) -> Rules:
        """The same lines, each for operations that fulfil a condition only."""

        def both(entry: Entry) -> Callable[[Operation], bool]:
            own = entry.where
            return condition if own is None else lambda operation: own(operation) and condition(operation)

        return Rules(tuple(replace(entry, where=both(entry)) for entry in self.entries))

    def __repr__(self) -> str:
        lines = [f"    {_describe_entry(entry)}: {entry.rule}" for entry in self.entries]
        return "\n".join(("Rules(", *lines, ")"))


def on(operations: str | Sequence[str], rule: Rule, /, **conditions: Any) -> Entry:
    """A line of a table: names or groups of operations, or a pattern of sites, and their rule.

    Args:
        operations: names and groups (`"linear"`, `("conv2d", "linear")`), or one pattern of sites (`"h.*.mlp.act"`,
            `"**/softmax@*"`).
        rule: what they get.
        **conditions: of `Entry`: `sites`, `where`, `first`.

    Raises:
        RuleError: an operation that does not exist, a rule that is none, or not for that group.

    Examples:
        >>> from tdhook.attribution.rules import Epsilon, Stop
        >>> on("linear", Epsilon(), sites="features.*").first
        False
    """
    names = (operations,) if isinstance(operations, str) else tuple(operations)
    if len(names) == 1 and "sites" not in conditions and not _is_operation(names[0]):
        return Entry(rule, None, names[0], **conditions)
    return Entry(rule, frozenset(names) if names != ("*",) else None, **conditions)


def _entry(key: Any, rule: Any) -> Entry:
    return on(key, rule) if isinstance(key, (str, tuple)) else Entry(rule, None, key)


def _is_operation(name: str) -> bool:
    """Whether a key means an operation, not a site: sites that are one plain word are given with `sites=`."""
    return name == "*" or name.isidentifier()


def _describe_entry(entry: Entry) -> str:
    names = "*" if entry.operations is None else ", ".join(sorted(entry.operations))
    parts = ["first"] if entry.first else []
    parts.append(names)
    parts += [f"at {entry.sites}"] if entry.sites is not None else []
    parts += ["where ..."] if entry.where is not None else []
    return " ".join(parts)
