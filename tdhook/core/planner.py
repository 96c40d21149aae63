"""The run on fake tensors that finds which operation gets which rule.

What depends on the input is what autograd says requires a gradient, when the floating-point inputs (or, where there are none,
the embeddings of the integer ones) do. So a value that a rule, a `detach` or a comparison cuts off does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .compat import unwrapped
from .decompositions import DECOMPOSITIONS
from .errors import RuleError
from .functional import FunctionalModel
from .kinds import Position, bias_position, group_of, is_elementwise, plain_name, words
from .operations import OperationMode
from .plan import Key, Plan, Planned
from .rules import Entry, Operation, Rule, Rules
from .scope import Frame, Ruler
from .sites import Site, Tree, Want
from .structure import tensors


@torch.compiler.assume_constant_result
def wants_of(tree: Tree, entry: Entry) -> tuple[Want, ...] | None:
    if entry.sites is None:
        return None
    wants = tree.resolve(entry.sites)
    for want in wants:
        if want.site.port != "out" or want.site.keys:
            raise RuleError(f"rules are for operations, not for the value {want.request!r}; leave out the port.")
    return wants


class Planner(Ruler):
    """Runs the model once and writes down the operations that depend on its input."""

    def __init__(self, f: FunctionalModel, rules: Rules, params: Any, seeds: list[Tensor]):
        super().__init__()
        self.rules, self.seeds = rules, seeds
        self.entry_wants = [wants_of(f.base.blueprint.tree, entry) for entry in rules.entries]
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
