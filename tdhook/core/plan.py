"""What a table of rules means for one model: the plan, and what compiled code may ask it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch

from .errors import RuleError
from .kinds import LINEAR_GROUPS, Position

Key = tuple[str, int, str, int]  # module path, how many calls of it had begun, operation, its number in that call


class Planned(NamedTuple):
    """One operation that depends on the input, and the rule that it gets.

    Attributes:
        number: its place in the order of execution.
        site: its address.
        name, group, active, of_input, nonnegative, gates: as in `Operation`.
        line: the number of its line in the table; None for the plain gradient.
        live: whether the output depends on it: what a rule has cut off does not count.
        has_constant: something that does not depend on the input is added: a bias, a position embedding, a class token.
        still: which of the floating-point tensors in the active arguments do not depend on the input, counted from 0: a class
            token that is joined to patches.
        absolute: its operand is an input, and the cotangent there is the relevance itself (see `Rule.absolute`).
        alias: it returns its operand, or a view of it, which a later operation may write into.
    """

    number: int
    site: str
    name: str
    group: str
    active: tuple[Position, ...]
    of_input: bool
    nonnegative: bool
    gates: tuple[Position, ...]
    line: int | None
    live: bool
    has_constant: bool
    still: tuple[int, ...] = ()
    absolute: bool = False
    alias: bool = False


@dataclass(frozen=True, eq=False)
class Plan:
    """What a table of rules means for one model and inputs of given shapes.

    Attributes:
        table: the operations that depend on the input, in the order in which they run, by where they occur.
        decomposed: fused operations that are carried out in parts.
        absolute: which floating-point inputs get the relevance itself as their gradient, because only rules such as the
            z-box read them.
        mixed: each floating-point input that such a rule reads, and another operation too, with the addresses of both.
    """

    table: Mapping[Key, Planned]
    decomposed: frozenset[Key]
    absolute: frozenset[int]
    mixed: tuple[tuple[int, str, str], ...]


# Dynamo takes for constant what a function without tensors returns, if it consists of numbers and strings; so compiled code
# knows a plan by its number.
PLANS: WeakValueDictionary[int, Plan] = WeakValueDictionary()
NUMBERS = itertools.count()


def planned_at(plan: Plan | int, key: Key) -> Planned | None:
    """What is planned for the operation that occurs there; None for one that does not depend on the input."""
    if isinstance(plan, Plan):
        return plan.table.get(key)
    found = _constant_at(plan, key)
    return None if found is None else Planned(*found)


@torch.compiler.assume_constant_result
def _constant_at(number: int, key: Key) -> tuple | None:
    found = PLANS[number].table.get(key)
    return None if found is None else tuple(found)


@torch.compiler.assume_constant_result
def is_decomposed(plan: Plan | int, key: Key) -> bool:
    """Whether the operation that occurs there is carried out in parts."""
    return key in (plan if isinstance(plan, Plan) else PLANS[plan]).decomposed


@torch.compiler.assume_constant_result
def absolute_inputs(plan: Plan | int) -> tuple[int, ...]:
    """Which floating-point inputs get the relevance itself as their gradient.

    Raises:
        RuleError: one that other operations read, too.
    """
    plan = plan if isinstance(plan, Plan) else PLANS[plan]
    for i, absolute, relative in plan.mixed:
        raise RuleError(
            f"input {i} is read by {absolute!r}, whose rule gives the relevance itself, and by {relative!r}, whose gradient "
            "has to be multiplied by the input; give both a rule of one kind."
        )
    return tuple(sorted(plan.absolute))


@torch.compiler.assume_constant_result
def addresses(plan: Plan | int) -> tuple[str, ...]:
    """Where the planned operations are, by their numbers."""
    plan = plan if isinstance(plan, Plan) else PLANS[plan]
    return tuple(planned.site for planned in plan.table.values())


@torch.compiler.assume_constant_result
def live_numbers(plan: Plan | int, lines: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The numbers of the operations that the output depends on, less views; with `lines` of those that have one of these."""
    planned = (plan if isinstance(plan, Plan) else PLANS[plan]).table.values()
    return tuple(p.number for p in planned if p.live and (not p.alias if lines is None else p.line in lines))


def is_nonlinear(planned: Planned) -> bool:
    """Whether the plain gradient of an operation, times its operand, is not what the operation is worth."""
    return planned.live and planned.group not in LINEAR_GROUPS
