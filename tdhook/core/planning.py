"""Which operation of a model gets which rule: one run on fake tensors, before anything is computed.

What depends on the input is what autograd says requires a gradient, when the floating-point inputs (or, where there are none,
the embeddings of the integer ones) do. So a value that a rule, a `detach` or a comparison cuts off does not count.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.utils import _pytree as pytree

from .compat import is_compiling, unwrapped
from .decompositions import DECOMPOSITIONS
from .derivatives import Freezer
from .errors import RuleError
from .functional import Execution, FunctionalModel
from .kinds import LINEAR_GROUPS, Position, bias_position, group_of, is_elementwise, plain_name, words
from .operations import OperationMode
from .rules import Entry, Operation, Rule, Rules
from .scope import Frame, Handler, Ruler
from .sites import Site, Tree, Want
from .structure import tensors
from .tracing import run_abstract_or_real

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
_PLANS: WeakValueDictionary[int, Plan] = WeakValueDictionary()
_NUMBERS = itertools.count()


def planned_at(plan: Plan | int, key: Key) -> Planned | None:
    """What is planned for the operation that occurs there; None for one that does not depend on the input."""
    if isinstance(plan, Plan):
        return plan.table.get(key)
    found = _constant_at(plan, key)
    return None if found is None else Planned(*found)


@torch.compiler.assume_constant_result
def _constant_at(number: int, key: Key) -> tuple | None:
    found = _PLANS[number].table.get(key)
    return None if found is None else tuple(found)


@torch.compiler.assume_constant_result
def is_decomposed(plan: Plan | int, key: Key) -> bool:
    """Whether the operation that occurs there is carried out in parts."""
    return key in (plan if isinstance(plan, Plan) else _PLANS[plan]).decomposed


@torch.compiler.assume_constant_result
def absolute_inputs(plan: Plan | int) -> tuple[int, ...]:
    """Which floating-point inputs get the relevance itself as their gradient.

    Raises:
        RuleError: one that other operations read, too.
    """
    plan = plan if isinstance(plan, Plan) else _PLANS[plan]
    for i, absolute, relative in plan.mixed:
        raise RuleError(
            f"input {i} is read by {absolute!r}, whose rule gives the relevance itself, and by {relative!r}, whose gradient "
            "has to be multiplied by the input; give both a rule of one kind."
        )
    return tuple(sorted(plan.absolute))


@torch.compiler.assume_constant_result
def addresses(plan: Plan | int) -> tuple[str, ...]:
    """Where the planned operations are, by their numbers."""
    plan = plan if isinstance(plan, Plan) else _PLANS[plan]
    return tuple(planned.site for planned in plan.table.values())


@torch.compiler.assume_constant_result
def live_numbers(plan: Plan | int, lines: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The numbers of the operations that the output depends on, less views; with `lines` of those that have one of these."""
    planned = (plan if isinstance(plan, Plan) else _PLANS[plan]).table.values()
    return tuple(p.number for p in planned if p.live and (not p.alias if lines is None else p.line in lines))


def check_sites(f: FunctionalModel, rules: Rules) -> None:
    """Raises `RuleError` or `SiteError` for a line of the table that means no module of the model."""
    for entry in rules.entries:
        _wants(f.base.blueprint.tree, entry)


@torch.compiler.assume_constant_result
def _wants(tree: Tree, entry: Entry) -> tuple[Want, ...] | None:
    if entry.sites is None:
        return None
    wants = tree.resolve(entry.sites)
    for want in wants:
        if want.site.port != "out" or want.site.keys:
            raise RuleError(f"rules are for operations, not for the value {want.request!r}; leave out the port.")
    return wants


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
    number = next(_NUMBERS)
    _remember(f.base.blueprint.plans, number, plan)
    _PLANS[number] = plan
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
            planner = _Planner(f, rules, params, seeds)
            handlers = tuple(type(handler)(handler.wants) for handler in outer)
            output = f._run(params, inputs, extra, Execution((*handlers, planner)))
            return planner.plan(output)

    return run_abstract_or_real(run, *pytree.tree_map_only(Tensor, _below_derivatives, (params, inputs, extra)))


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


class _Planner(Ruler):
    """Runs the model once and writes down the operations that depend on its input."""

    def __init__(self, f: FunctionalModel, rules: Rules, params: Any, seeds: list[Tensor]):
        super().__init__()
        self.rules, self.seeds = rules, seeds
        self.entry_wants = [_wants(f.base.blueprint.tree, entry) for entry in rules.entries]
        self.used: set[int] = set()
        self.sites: dict[tuple[str, str], int] = {}  # how often an operation ran so far
        self.numbers: dict[tuple, int] = {}
        self.found: list[_Found] = []
        self.decomposed: set[Key] = set()
        self.keep: list[Any] = []  # a storage that is freed would give its address to another
        self.activated: set[Any] = set()  # nodes of autograd: what modules that are an activation returned
        self.tainted: set[int] = set()  # storages of integers that depend on the inputs
        self.learned = self._storages(list(_parameters(f, params)))

    def operation(self, frame: Frame, path: str, op: str, function: Callable, in_place: bool) -> Callable:
        within = (path, frame.counts.get((path, None), 0), op)
        number = self.numbers[within] = self.numbers.get(within, -1) + 1
        key = (*within, number)
        call = self.sites[path, op] = self.sites.get((path, op), -1) + 1
        site = Site(Site.parse(path).path if path else (), op, call)

        def run(*args: Any, **kwargs: Any) -> Any:
            if op in DECOMPOSITIONS and _active(args, kwargs):
                self.decomposed.add(key)
                with OperationMode(frame):
                    return DECOMPOSITIONS[op](*args, **kwargs)
            return self._record(key, site, function, args, kwargs, in_place)

        return run

    def module(self, frame: Frame, module: Any, path: str, call: int, forward: Callable) -> Callable:
        site = Site(Site.parse(path).path if path else (), "module", call)

        def run(module: Any, *args: Any, **kwargs: Any) -> Any:
            if not path:
                self.tainted |= self._storages([t for _, t in tensors((args, kwargs)) if not t.is_floating_point()])
            before = len(self.found)
            output = forward(module, *args, **kwargs)
            active = _active(args, kwargs)
            names = [found.operation.name for found in self.found[before:]]
            if whole := _is_activation(module, active, names, output):
                self.activated.add(output.grad_fn)
            if not active or not names:
                return output
            group = "activation" if whole else "function"
            operation = self._described(Operation("module", site, group, forward, args, kwargs, active))
            line = self._line(operation)
            if line is None:
                return output
            del self.found[before:]
            return self._add((path, call + 1, "module", 0), operation, line, output)

        return run

    def _record(self, key: Key, site: Site, function: Callable, args: tuple, kwargs: dict, in_place: bool) -> Any:
        active = _active(args, kwargs)
        output = function(*args, **kwargs)
        if not active:
            self._seed_embeddings(key[2], args, kwargs, output)
            return output
        if not any(t.is_floating_point() for _, t in tensors(output)) and key[2] != "setitem":
            return output  # a question about the operand, a comparison
        name = plain_name(key[2])
        group = group_of(name, active, args, kwargs)
        operation = self._described(Operation(name, site, group, function, args, kwargs, active))
        alias = not in_place and bool(self._storages(output) & self._storages(_operands(operation)))
        return self._add(key, operation, self._line(operation), output, alias)

    def _add(self, key: Key, operation: Operation, line: int | None, output: Any, alias: bool = False) -> Any:
        if line is not None:
            self.used.add(line)
        if self._stops(line):
            output = pytree.tree_map_only(Tensor, Tensor.detach, output)
        result = operation.args[0] if operation.name == "setitem" else output
        nodes = [t.grad_fn for _, t in tensors(result)]
        inputs = [i for i in map(self._input_of, _operands(operation)) if i is not None]
        still = tuple(i for i, t in enumerate(floating(operation.argument(p) for p in operation.active)) if not t.requires_grad)
        without_values = replace(operation, function=_untraced, args=(), kwargs={})
        self.found.append(_Found(key, without_values, line, nodes, inputs, _adds_constant(operation), still, alias))
        return output

    def _rule(self, line: int | None) -> Rule | None:
        return None if line is None else self.rules.entries[line].rule

    def _stops(self, line: int | None) -> bool:
        rule = self._rule(line)
        return rule is not None and rule.stops

    # What an operand is

    def _described(self, operation: Operation) -> Operation:
        moving = _operands(operation)
        of_input = all(self._input_of(t) is not None for t in moving)
        gates = _gates(operation, self.activated) if operation.group == "product" else ()
        return replace(operation, of_input=of_input, nonnegative=all(map(_is_nonnegative, moving)), gates=gates)

    def _input_of(self, tensor: Tensor) -> int | None:
        """Which input a tensor is a selection or rearrangement of."""
        for i, seed in enumerate(self.seeds):
            if tensor is seed:
                return i
        source = _source(tensor.grad_fn)
        for i, seed in enumerate(self.seeds):
            if getattr(source, "variable", None) is seed:
                return i
        return None

    def _seed_embeddings(self, op: str, args: tuple, kwargs: Mapping, output: Any) -> None:
        """Lets what is looked up by an integer input depend on it."""
        given = [t for _, t in tensors((args, kwargs)) if not t.is_floating_point()]
        if not self._storages(given) & self.tainted:
            return
        # A table of constants, such as the sines of positions, is not what is explained.
        learned = op in _EMBEDDINGS or (op in _LOOK_UPS and bool(self._storages(args[:1]) & self.learned))
        for _, result in tensors(output):
            if not result.is_floating_point():
                self.tainted |= self._storages(result)
            elif learned:
                result.requires_grad_()

    def _storages(self, value: Any) -> set[int]:
        storages = [unwrapped(tensor).untyped_storage() for _, tensor in tensors(value)]
        self.keep += storages
        return {storage._cdata for storage in storages}

    # Which rule

    def _line(self, operation: Operation) -> int | None:
        """The first line of the table that fits."""
        for i, entry in enumerate(self.rules.entries):
            if operation.name == "module" and operation.group == "function" and "module" not in (entry.operations or ()):
                continue
            if not (entry.first and i in self.used) and self._is_at(i, operation.site) and entry.fits(operation):
                return i
        return None

    def _is_at(self, index: int, site: Site) -> bool:
        wants = self.entry_wants[index]
        if wants is None:
            return True
        for want in wants:
            if want.site.op is None:
                if site.path[: len(want.site.path)] == want.site.path:
                    return True
            elif want.site.path == site.path and want.site.op in ("*", site.op) and want.site.call in (None, "*", site.call):
                return True
        return False

    # The result

    def plan(self, output: Any) -> Plan:
        self._check()
        reachable = _reachable([t.grad_fn for _, t in tensors(output)])
        table = {}
        for i, found in enumerate(self.found):
            o = found.operation
            live = self._stops(found.line) or any(node in reachable for node in found.nodes)
            known = (o.name, o.group, o.active, o.of_input, o.nonnegative, o.gates)
            table[found.key] = Planned(
                i, str(self._site(found)), *known, found.line, live, found.has_constant, found.still, False, found.alias
            )
        absolute, mixed = self._read_by(list(table.values()))
        for found in self.found:
            if found.operation.of_input and absolute.issuperset(found.inputs):
                table[found.key] = table[found.key]._replace(absolute=True)
        return Plan(table, frozenset(self.decomposed), absolute, mixed)

    def _site(self, found: _Found) -> Site:
        """The address of an operation, without the number of the call if there is only one."""
        site = found.operation.site
        return site if self.sites.get((found.key[0], site.op)) else replace(site, call=None)

    def _read_by(self, operations: list[Planned]) -> tuple[frozenset[int], tuple[tuple[int, str, str], ...]]:
        absolute: dict[int, str] = {}
        relative: dict[int, str] = {}
        for planned, found in zip(operations, self.found):
            rule = self._rule(found.line)
            if not planned.live or self._stops(found.line) or (rule is None and planned.group == "shape"):
                continue
            for i in found.inputs:
                (absolute if rule is not None and rule.absolute else relative).setdefault(i, planned.site)
        return frozenset(absolute), tuple((i, absolute[i], relative[i]) for i in absolute if i in relative)

    def _check(self) -> None:
        for i, entry in enumerate(self.rules.entries):
            if entry.sites is None or i in self.used:
                continue
            names = sorted({str(self._site(f)) for f in self.found if self._is_at(i, f.operation.site)})
            why = (
                f"there run {', '.join(names[:6])}, which it is not for, or which an earlier line has."
                if names
                else "nothing that depends on the input runs there; tdhook.trace(f, params, inputs) lists what does."
            )
            raise RuleError(f"the rule {entry.rule} at {entry.sites!r} fits nothing: {why}")
        if self.found and not self.used:
            groups = sorted({f.operation.group for f in self.found})
            raise RuleError(f"no line of the rules fits an operation of the model, which has {', '.join(groups)}.")


@dataclass(frozen=True, eq=False)
class _Found:
    key: Key
    operation: Operation
    line: int | None
    nodes: list[Any]  # of autograd: what the operation returned
    inputs: list[int]  # which inputs its operands are rearrangements of
    has_constant: bool
    still: tuple[int, ...]
    alias: bool


def _is_activation(module: Any, active: tuple, names: list[str], output: Any) -> bool:
    """Whether a module is an activation that is written out."""
    plain = len(active) == 1 and not module._modules and not module._parameters and isinstance(output, Tensor)
    return plain and len(names) > 1 and all(map(is_elementwise, names))


def _parameters(f: FunctionalModel, params: Any) -> Iterator[Tensor]:
    """The tensors in `params` that are parameters, not buffers."""
    for key, owners in f.base.blueprint.tensor_names.items():
        if owners[0][1] == "_parameters":
            value = params
            for name in key:
                value = value[name]
            yield value


def _operands(operation: Operation) -> list[Tensor]:
    return [t for p in operation.active for _, t in tensors(operation.argument(p)) if t.requires_grad]


def _adds_constant(operation: Operation) -> bool:
    """Whether an operation adds or joins something that does not depend on the input."""
    given = [t for _, t in tensors((operation.args, dict(operation.kwargs)))]
    if operation.group == "sum" or operation.name in ("cat", "concat", "concatenate", "stack", "where"):
        return any(t.is_floating_point() and not t.requires_grad for t in given)
    if operation.group in ("normalization", "batch_norm"):
        return len(given) > 2
    bias = bias_position(operation.name, operation.args, operation.kwargs)
    return bias is not None and operation.argument(bias) is not None


def floating(values: Any) -> list[Tensor]:
    """The floating-point tensors in operands, in order."""
    leaves = pytree.tree_flatten(list(values))[0]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _reachable(nodes: list[Any]) -> set[Any]:
    """The nodes of the autograd graph that lead to these."""
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return seen


def _untraced(*args: Any, **kwargs: Any) -> Any:
    raise RuleError("a plan holds no values; rules are applied while the model runs.")


def _active(args: tuple, kwargs: Mapping) -> tuple[Position, ...]:
    return tuple(
        position for position, value in (*enumerate(args), *kwargs.items()) if any(t.requires_grad for _, t in tensors(value))
    )


_EMBEDDINGS = ("embedding", "embedding_bag")
_LOOK_UPS = ("getitem", "index_select", "gather", "take")
_REARRANGING = words(
    "CloneBackward ViewBackward UnsafeViewBackward ReshapeAliasBackward PermuteBackward TransposeBackward TBackward "
    "UnsqueezeBackward SqueezeBackward ExpandBackward SliceBackward SelectBackward AliasBackward SplitBackward "
    "SplitWithSizesBackward UnbindBackward UnfoldBackward IndexBackward IndexSelectBackward GatherBackward FlipBackward "
    "RollBackward AsStridedBackward ToCopyBackward DiagonalBackward NarrowBackward RepeatBackward "
    "UnsafeSplitBackward UnsafeSplitWithSizesBackward MovedimBackward ContiguousBackward"
)
_POOLING = words("MaxPool AvgPool Dropout MeanBackward AdaptiveMaxPool AdaptiveAvgPool MaxBackward AmaxBackward")
_NONNEGATIVE = words("ReluBackward SigmoidBackward SoftmaxBackward SoftplusBackward ExpBackward AbsBackward SquareBackward")

_ACTIVATION_NODES = (
    "Silu",
    "Gelu",
    "Relu",
    "Tanh",
    "Elu",
    "LeakyRelu",
    "Mish",
    "Softplus",
    "Hardswish",
    "Hardsigmoid",
    "Threshold",
)


def _source(node: Any, passing: frozenset[str] = _REARRANGING) -> Any:
    """The node of the autograd graph below one, past those whose name starts with one of `passing`."""
    while node is not None and _node_name(node).startswith(("CopyBackwards", *passing)):
        if _node_name(node).startswith("CopyBackwards"):
            node = node.next_functions[-1][0]  # an operation in place: what was copied, not where it was copied to
            continue
        following = [n for n, _ in node.next_functions if n is not None]
        if len(following) != 1:
            break
        node = following[0]
    return node


def _is_nonnegative(tensor: Tensor) -> bool:
    return _node_name(_source(tensor.grad_fn, _REARRANGING | _POOLING)).startswith(tuple(_NONNEGATIVE))


def _gates(operation: Operation, activated: set[Any]) -> tuple[Position, ...]:
    """Which factors are gates: those that come out of a sigmoid, otherwise out of any activation."""
    made_by = {p: _source(t.grad_fn) for p in operation.active for t in (operation.argument(p),)}
    for names, nodes in ((("Sigmoid",), set()), (_ACTIVATION_NODES, activated)):
        gates = tuple(p for p, node in made_by.items() if node in nodes or _node_name(node).startswith(names))
        if gates:
            return gates if len(gates) < len(operation.active) else ()
    return ()


def _node_name(node: Any) -> str:
    return "" if node is None else node.name().split("::")[-1]


def is_nonlinear(planned: Planned) -> bool:
    """Whether the plain gradient of an operation, times its operand, is not what the operation is worth."""
    return planned.live and planned.group not in LINEAR_GROUPS


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
