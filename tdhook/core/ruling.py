"""`with_rules`: the same values, another backward for operations, as a table of rules says."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .compat import grad_depth, is_compiling, is_wrapped, unwrapped
from .decompositions import DECOMPOSITIONS
from .derivatives import Freezer
from .errors import GradientError
from .functional import Execution, FunctionalModel
from .operations import OperationMode
from .plan import Key, Plan, Planned, is_decomposed, planned_at
from .planning import check_sites, make_plan
from .reading import Reader
from .rules import Operation, Rule, Rules
from .scope import Frame, Ruler
from .sites import Want
from .structure import put_in, tensors
from .transforms import Transform, require_sites
from .writing import Writer


class _Enforcer(Ruler):
    """Carries out a plan in one run.

    Args:
        rules: the table.
        plan: which operation gets which line of it.
        references: what rules kept of a run on a baseline.
        constants: what was a constant of the derivative in a run before, to be taken from there.
        probe: scales the operands and the result of an operation by 1 + 0, to tell what relevance goes in and out.
        written: values are written from outside, so that what comes out of a ReLU may be negative when it is read.
        resumed: what is explained is written at sites, so that no operand is an input.
    """

    def __init__(
        self,
        rules: Rules,
        plan: Plan | int,
        references: Mapping | None = None,
        constants: Mapping | None = None,
        probe: Probe | None = None,
        written: bool = False,
        resumed: bool = False,
    ):
        super().__init__()
        self.rules, self.plan = rules, plan
        self.references, self.constants, self.probe = references, constants, probe
        self.written, self.resumed = written, resumed
        self.numbers: dict[tuple, int] = {}

    def operation(self, frame: Frame, path: str, op: str, function: Callable, in_place: bool) -> Callable:
        within = (path, frame.counts.get((path, None), 0), op)
        number = self.numbers[within] = self.numbers.get(within, -1) + 1
        key = (*within, number)
        if is_decomposed(self.plan, key):
            return decomposed(frame, op, function)
        planned = planned_at(self.plan, key)
        return function if planned is None else self._ruled(key, planned, function, in_place)

    def module(self, frame: Frame, module: Any, path: str, call: int, forward: Callable) -> Callable:
        key = (path, call + 1, "module", 0)
        planned = planned_at(self.plan, key)
        if planned is None or (planned.line is None and self.probe is None):
            return forward

        times = 0

        def inside(*args: Any, **kwargs: Any) -> Any:
            nonlocal times
            times += 1
            # Sites inside are seen once, however often a rule evaluates the module.
            paused, frame.paused = frame.paused, frame.paused or times > 1
            try:
                return forward(module, *args, **kwargs)
            finally:
                frame.paused = paused

        ruled = self._ruled(key, planned, inside, False)
        return lambda module, *args, **kwargs: ruled(*args, **kwargs)

    def _ruled(self, key: Key, planned: Planned, function: Callable, in_place: bool) -> Callable:
        rule = None if planned.line is None else self.rules.entries[planned.line].rule
        planned = planned._replace(absolute=False) if self.resumed else planned
        # What a value that does not go on (or is a constant for what follows) is worth is counted where it is used. A view
        # absorbs nothing, and has to stay one.
        probed = planned.live and not (planned.alias if rule is None else rule.stops)
        probe = self.probe if probed else None
        if rule is None and probe is None:
            return function
        call = out_of_place(function) if in_place else function

        def run(*args: Any, **kwargs: Any) -> Any:
            if probe is not None:
                args, kwargs = probe.operands(planned, args, kwargs)
            output = call(*args, **kwargs) if rule is None else self._apply(rule, key, planned, call, args, kwargs)
            return output if probe is None else probe.result(planned, output, rule is None, args)

        return run

    def _apply(self, rule: Rule, key: Key, planned: Planned, call: Callable, args: tuple, kwargs: dict) -> Any:
        reference = None if self.references is None else self.references.get(key)
        constant = self._constant(key, planned)
        if rule.smooth and isinstance(constant, _Detacher):
            constant = _detached
        operation = _running(planned, call, args, kwargs, reference, constant)
        if self.written:
            operation = replace(operation, nonnegative=False, of_input=operation.of_input and not self.resumed)
        return rule(operation)

    def _constant(self, key: Key, planned: Planned) -> Callable[[Tensor], Tensor]:
        if self.constants is not None:
            return _next_of(self.constants[key])
        return _detached if is_compiling() else _Detacher(planned.site)


class _Keeper(_Enforcer):
    """Runs on a baseline, and asks each rule what it wants of that."""

    def __init__(self, rules: Rules, plan: Plan | int) -> None:
        super().__init__(rules, plan)
        self.kept: dict[Key, Any] = {}

    def _apply(self, rule: Rule, key: Key, planned: Planned, call: Callable, args: tuple, kwargs: dict) -> Any:
        operation = _running(planned, call, args, kwargs, None, _detached)
        if rule.keeps:
            self.kept[key] = rule.keep(operation)
        return operation.evaluate()


class _ConstantKeeper(_Enforcer):
    """Notes what each rule asks to be a constant."""

    def __init__(self, rules: Rules, plan: Plan | int, references: Mapping | None) -> None:
        super().__init__(rules, plan, references)
        self.kept: dict[Key, list[Tensor]] = {}

    def _constant(self, key: Key, planned: Planned) -> Callable[[Tensor], Tensor]:
        kept = self.kept[key] = []

        def constant(value: Tensor) -> Tensor:
            kept.append(value)
            return value

        return constant


def _running(
    planned: Planned, function: Callable, args: tuple, kwargs: dict, reference: Any, constant: Callable[[Tensor], Tensor]
) -> Operation:
    known = (planned.of_input, planned.nonnegative, planned.gates)
    return Operation(
        planned.name, planned.site, planned.group, function, args, kwargs, planned.active, *known, reference, constant
    )


def _refuse_graph(cotangent: Tensor) -> None:
    if torch.is_grad_enabled():  # that is, a graph of the backward pass is being made
        raise GradientError(
            "create_graph=True over a model with rules: the coefficients of the rules are constants, so derivatives of the "
            "relevance would be wrong; use tdhook.attribution.lrp, which can be differentiated."
        )


def _detached(value: Tensor) -> Tensor:
    return value.detach()


class _Detacher:
    """`detach`, or an error where that would make a derivative of the relevance silently wrong."""

    def __init__(self, address: str) -> None:
        self.address = address

    def __call__(self, value: Tensor) -> Tensor:
        if grad_depth(value) > 1:
            raise GradientError(
                f"the relevance is being differentiated, but the rule at {self.address!r} takes coefficients from values as "
                "constants; use tdhook.attribution.lrp, which can be differentiated, or detach what goes in."
            )
        return value.detach()


def _next_of(values: list[Tensor]) -> Callable[[Tensor], Tensor]:
    remaining = iter(values)
    return lambda _: next(remaining)


@dataclass(frozen=True, eq=False)
class Probe:
    """Tells how much relevance enters and leaves each operation: the gradient with respect to scales of 1 + 0.

    Where the cotangent is the relevance itself (see `Rule.absolute`), 0 is added instead.

    Attributes:
        operands_by, result_by: Tensor [N] of zeros, one for each planned operation.
        output_by: Tensor [] of zero, for the output of the model.
    """

    operands_by: Tensor
    result_by: Tensor
    output_by: Tensor

    def operands(self, planned: Planned, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        by = self.operands_by[planned.number]
        numbers = itertools.count()

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or next(numbers) in planned.still:
                return leaf
            return _moved(leaf.clone() if planned.name == "setitem" else leaf, by, planned.absolute)

        bound: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        for position in planned.active:
            bound[position] = pytree.tree_map(moved, bound[position])
        if planned.name == "setitem" and 0 in planned.active:
            bound[0] = args[0].copy_(bound[0])  # it goes on as this very tensor
        return tuple(bound[i] for i in range(len(args))), {name: bound[name] for name in kwargs}

    def result(self, planned: Planned, output: Any, unruled: bool, args: tuple) -> Any:
        by = self.result_by[planned.number]
        if planned.name == "setitem":
            args[0].copy_(_moved(args[0].clone(), by, planned.absolute))
            return output
        return pytree.tree_map(lambda leaf: _moved(leaf, by, planned.absolute and unruled), output)

    def output(self, output: Any) -> Any:
        for keys, tensor in tensors(output):
            output = put_in(output, keys, _moved(tensor, self.output_by, False))
        return output


def _moved(value: Any, by: Tensor, absolute: bool) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    by = by.to(value.dtype)
    # The scores of a mask are -inf, and nothing flows through them.
    return value + (by if absolute else torch.where(value.isfinite(), value, torch.zeros_like(value)) * by)


def out_of_place(function: Callable) -> Callable:
    """An operation that overwrites its first argument, made to overwrite a copy: a rule may evaluate it several times."""
    return lambda first, *args, **kwargs: function(first.clone(), *args, **kwargs)


def decomposed(frame: Frame, op: str, function: Callable) -> Callable:
    """A fused operation carried out in parts, each of which is an operation of the same module; its own values are kept.

    Under vmap it has the values of its parts, equal up to rounding: torch cannot batch recurrent layers.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        with OperationMode(frame):
            parts = DECOMPOSITIONS[op](*args, **kwargs)
        if not is_compiling() and any(unwrapped(t).ndim > t.ndim for _, t in tensors((args, kwargs))):
            return parts
        # Not under no_grad, where torch may choose a kernel with other rounding.
        return _with_values(function(*args, **kwargs), parts)

    return run


def _with_values(whole: Any, parts: Any) -> Any:
    if isinstance(whole, Tensor):
        return whole.detach() + (parts - parts.detach())
    if isinstance(whole, (tuple, list)):
        return type(whole)(_with_values(w, p) for w, p in zip(whole, parts))
    return whole


@dataclass(frozen=True, eq=False, repr=False)
class Ruled(Transform):
    rules: Rules
    references: Mapping | None = None
    constants: Mapping | None = None
    probe: Probe | None = None

    edits_backward: ClassVar[bool] = True

    def key(self) -> tuple:
        return (type(self), self.rules, self.inner.key())

    def plan(self, params: Any, inputs: Any, extra: tuple = (), execution: Execution | None = None) -> Plan | int:
        """Which operation gets which rule, found by one run on fake tensors with inputs of these shapes."""
        return make_plan(self.inner, self.rules, params, inputs, extra, execution or Execution())

    def _run(self, params: Any, inputs: Any, extra: tuple, execution: Execution) -> Any:
        if any(isinstance(handler, Ruler) for handler in execution.handlers):
            return self.inner._run(params, inputs, extra, execution)  # an outer one has these rules, too
        plan = self.plan(params, inputs, extra, execution)
        written = not all(isinstance(handler, (Freezer, Reader)) for handler in execution.handlers)
        enforcer = _Enforcer(
            self.rules, plan, self.references, self.constants, self.probe, written, execution.substitutes is not None
        )
        output = self._run_with(enforcer, params, inputs, extra, execution)
        if self.constants is None and not is_compiling():
            self._refuse_second_order(output)
        return output if self.probe is None else self.probe.output(output)

    def _refuse_second_order(self, output: Any) -> None:
        """Lets `autograd.grad(..., create_graph=True)` fail: what it returned could be differentiated, but wrongly."""
        if all(entry.rule.smooth for entry in self.rules.entries):
            return
        for _, tensor in tensors(output):
            if tensor.requires_grad and not is_wrapped(tensor):
                tensor.register_hook(_refuse_graph)

    def _run_with(self, ruler: Ruler, params: Any, inputs: Any, extra: tuple, execution: Execution) -> Any:
        return self.inner._run(params, inputs, extra, execution.within(ruler))

    def on_baseline(self, params: Any, baselines: Any, writes: Mapping[Want, Tensor] | None = None) -> Ruled:
        """The same with what its rules want to know of a run on a baseline, or with values written at sites."""
        keeper = _Keeper(self.rules, self.plan(params, baselines))
        writers = (Writer(tuple(writes), writes),) if writes else ()
        self._run_with(keeper, params, baselines, (), Execution(writers))
        return replace(self, references=keeper.kept)

    def differentiable(self, params: Any, inputs: Any) -> Ruled:
        """The same with the coefficients of its rules taken from a run on `inputs`, so that gradients can go through them."""
        keeper = _ConstantKeeper(self.rules, self.plan(params, inputs), self.references)
        self._run_with(keeper, params, inputs, (), Execution())
        return replace(self, constants=keeper.kept)

    def probed(self, params: Any, inputs: Any, probe: Probe, writes: Mapping[Want, Tensor] | None = None) -> Any:
        """The output, with probes at all operations; with `writes` as a run that is resumed from there."""
        resumed = Execution((Writer(tuple(writes), writes),), substitutes={}) if writes else Execution()
        return replace(self, probe=probe)._run(params, inputs, (), resumed)

    def __repr__(self) -> str:
        return f"with_rules({self.inner!r}, {len(self.rules.entries)} rules)"


def with_rules(f: FunctionalModel, rules: Any) -> Ruled:
    """Keeps the values and gives operations another backward, as a table of propagation rules says.

        y = with_rules(f, rules)(params, x) equals f(params, x) bit for bit;  its relevance at a value v is v * dy/dv

    Args:
        f: functional model. Rules that it already has come after the new ones.
        rules: a preset of `tdhook.attribution.rules`, or a mapping from operations, groups of operations or patterns of sites
            to rules; see `tdhook.attribution.rules.Rules`.

    Returns:
        `g(params, inputs) -> output`, again a functional model.

    Raises:
        RuleError: a rule that is none, an operation or a site that the model does not have or does not run; when called: a rule
            that does not fit its operation, a table that fits no operation. GradientError, when called: a derivative of the
            relevance, of which `tdhook.attribution.lrp` is capable.

    Cost: the forward pass, with what the rules add to it. The first call with new shapes adds a run on fake tensors.

    Examples:
        >>> from tdhook.attribution.rules import Epsilon
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.ReLU()))
        >>> g = with_rules(f, {"linear": Epsilon(0.5)})
        >>> bool((g(params, torch.ones(1, 2)) == f(params, torch.ones(1, 2))).all())
        True
    """
    require_sites(f)
    table = Rules.of(rules)
    inner: FunctionalModel = f
    while isinstance(inner, Transform):
        if isinstance(inner, Ruled):
            table = table + inner.rules
        inner = inner.inner
    check_sites(f, table)
    return Ruled(f, (), table)


def plan_of(f: Any, params: Any, inputs: Any) -> Plan | int | None:
    """The plan of the outermost rules of a model; None if it has none."""
    while isinstance(f, Transform):
        if isinstance(f, Ruled):
            return f.plan(params, inputs)
        f = f.inner
    return None
