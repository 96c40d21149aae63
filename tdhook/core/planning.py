"""Plans of rules: made before anything is computed, once for each model, table and shapes of inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.utils import _pytree as pytree

from .compat import is_compiling, unwrapped
from .derivatives import Freezer
from .functional import Execution, FunctionalModel
from .plan import NUMBERS, PLANS, Plan
from .planner import Planner, wants_of
from .rules import Entry, Rules
from .scope import Handler
from .tracing import run_abstract_or_real


def check_sites(f: FunctionalModel, rules: Rules) -> None:
    """Raises `RuleError` or `SiteError` for a line of the table that means no module of the model."""
    for entry in rules.entries:
        wants_of(f.base.blueprint.tree, entry)


def make_plan(f: FunctionalModel, rules: Rules, params: Any, inputs: Any, extra: tuple, execution: Execution) -> Plan | int:
    """The plan for inputs of these shapes; found once and kept with the model.

    Raises:
        RuleError: a line for sites at which nothing runs, a table that fits no operation, a rule that does not fit.
    """
    outer = tuple(handler for handler in execution.handlers if handler.changes_dependence)
    if is_compiling():
        arguments = (_encode(params), _encode((inputs, extra)))
        return _number_of_plan(f, _encode_rules(rules), *arguments, tuple(h.wants for h in outer))
    plans = f.base.blueprint.plans
    key = (f.key(), rules, _encode((inputs, extra)), tuple((type(h), h.wants) for h in outer))
    if key not in plans:
        plan, abstract = _trace(f, rules, params, inputs, extra, outer)
        if not abstract:
            return plan
        _remember(plans, key, plan)
    return plans[key]


@torch.compiler.assume_constant_result
def _number_of_plan(f: FunctionalModel, rules: tuple, params: Any, arguments: Any, frozen: tuple) -> int:
    """A plan from shapes, which the compiler knows."""
    inputs, extra = _decode(arguments)
    plan, _ = _trace(f, _decode_rules(rules), _decode(params), inputs, extra, tuple(Freezer(wants) for wants in frozen))
    number = next(NUMBERS)
    _remember(f.base.blueprint.plans, number, plan)
    PLANS[number] = plan
    return number


def _remember(plans: dict, key: Any, plan: Plan) -> None:
    while len(plans) >= 64:
        plans.pop(next(iter(plans)))
    plans[key] = plan


def _trace(
    f: FunctionalModel, rules: Rules, params: Any, inputs: Any, extra: tuple, outer: tuple[Handler, ...]
) -> tuple[Plan, bool]:
    def run(params: Any, inputs: Any, extra: tuple) -> Plan:
        with torch.enable_grad(), torch.inference_mode(False):
            inputs, seeds = _seeded(inputs)
            planner = Planner(f, rules, params, seeds)
            handlers = tuple(type(handler)(handler.wants) for handler in outer)
            output = f._run(params, inputs, extra, Execution((*handlers, planner)))
            return planner.plan(output)

    return run_abstract_or_real(f, run, *pytree.tree_map_only(Tensor, _below_derivatives, (params, inputs, extra)))


def _below_derivatives(tensor: Tensor) -> Tensor:
    """The tensor that a surrounding `grad` or `vjp` hides, for a model that asks for values; not what a vmap hides."""
    below = unwrapped(tensor)
    return below if below.ndim == tensor.ndim else tensor


def _seeded(inputs: Any) -> tuple[Any, list[Tensor]]:
    leaves, spec = pytree.tree_flatten(inputs)
    seeds = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaves[i] = leaf.detach().requires_grad_()
            seeds.append(leaves[i])
    return pytree.tree_unflatten(leaves, spec), seeds


# A table as a tuple of constants: of an object that is made in compiled code, Dynamo hands on no values to what it does not
# trace. What a rule is for is known from its class.


def _encode_rules(rules: Rules) -> tuple:
    return tuple((type(e.rule), e.operations, e.sites, e.where, e.first) for e in rules.entries)


def _decode_rules(code: tuple) -> Rules:
    return Rules(tuple(Entry(object.__new__(kind), *rest) for kind, *rest in code))


# Arguments as nested tuples of constants, from which fake ones of the same shapes can be made again


def _encode(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), value.dtype, value.device)
    if isinstance(value, (TensorDictBase, Mapping)):
        kind = "tensordict" if isinstance(value, TensorDictBase) else "mapping"
        size = tuple(value.batch_size) if isinstance(value, TensorDictBase) else ()
        return (kind, tuple((key, _encode(element)) for key, element in value.items()), size)
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, tuple(_encode(element) for element in value), ())
    return ("constant", value)


def _decode(code: Any) -> Any:
    kind = code[0]
    if kind == "tensor":
        return torch.empty(code[1], dtype=code[2], device=code[3])
    if kind in ("mapping", "tensordict"):
        entries = {key: _decode(element) for key, element in code[1]}
        if kind == "mapping":
            return entries
        return TensorDict(entries, batch_size=code[2])
    if kind in ("tuple", "list"):
        elements = [_decode(element) for element in code[1]]
        return tuple(elements) if kind == "tuple" else elements
    return code[1]
