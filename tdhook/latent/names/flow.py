"""What one run of a model did, as a graph of values: which operation made each of them, from which others, in which module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ...core.compat import storage_key
from ...core.functional import Execution, FunctionalModel
from ...core.scope import Observer
from ...core.sites import Site
from ...core.structure import tensors
from ...core.tracing import run_abstract_or_real

# Operations that may return the very tensor that they got, without a change.
SAME = {
    "dropout", "to", "contiguous", "reshape", "view", "float", "type", "type_as", "expand", "flatten", "detach",
    "requires_grad",
}  # fmt: skip
# Operations whose result takes nothing but a shape from their input.
FRESH = {"new_empty", "new_zeros", "new_ones", "new_full", "empty_like", "zeros_like", "ones_like", "full_like", "size"}
# Operations after which a value is what it was, or some positions of it.
MOVED = {"getitem", "view", "reshape", "to", "float", "type_as", "dropout", "contiguous", "select"}
UNSEEN = {"alias", "written"}  # makers of values that no operation returned: they have no site
PRODUCTS = {"matmul", "mm", "bmm", "baddbmm", "einsum"}
FUSED = {"scaled_dot_product_attention", "multi_head_attention_forward", "flex_attention"}
MIXING = {*PRODUCTS, *FUSED, "linear", "addmm", "softmax", "conv1d", "conv2d"}  # no norm does any of these
NORMS = {"layer_norm", "rms_norm"}
SCALES = {"rsqrt", "sqrt", "std", "norm", "vector_norm"}  # in a norm that is written out


@dataclass(frozen=True)
class Ref:
    """A value, where a tensor stood among the arguments of an operation."""

    value: int


@dataclass
class Op:
    """One operation. `inputs` and `outputs` are (keys, value) pairs, keys as a site spells them."""

    path: str
    name: str
    call: int
    time: int
    args: tuple
    kwargs: dict
    inputs: list[tuple[tuple, int]]
    outputs: list[tuple[tuple, int]]

    @property
    def values(self) -> list[int]:
        """What the result depends on."""
        return [] if self.name in FRESH else [value for _, value in self.inputs]


@dataclass
class Call:
    """One call of a module, as `Op`, with its place in time and the calls inside."""

    path: str
    call: int
    start: int
    inputs: list[tuple[tuple, int]]
    end: int = -1
    outputs: list[tuple[tuple, int]] = field(default_factory=list)
    children: list[Call] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)


class Flow(Observer):
    """Records a run. A tensor that an operation overwrites becomes a new value."""

    operations = True

    def __init__(self, params: Any):
        self.time = 0
        self.now: dict[int, int] = {}  # from the id of a tensor to the value that it holds
        self.tensors: list[Tensor] = []  # of each value; kept, so that no id is given twice
        self.maker: list[Op | None] = []
        self.ops: list[Op] = []
        self.calls: list[Call] = []
        self.open: list[Call] = []
        self.by_storage: dict[int, list[Tensor]] = {}
        self.weights: dict[int, str] = {}
        for key, tensor in sorted(params.items(include_nested=True, leaves_only=True), key=lambda item: str(item[0])):
            self.weights[self._value(tensor)] = ".".join(key) if isinstance(key, tuple) else key

    def _value(self, tensor: Tensor, new: Op | None = None) -> int:
        known = self.now.get(id(tensor))
        if known is not None and (new is None or new.name in SAME or self.maker[known] is new):
            return known
        value = self.now[id(tensor)] = len(self.tensors)
        self.tensors.append(tensor)
        self.maker.append(new)
        sharing = self.by_storage.setdefault(storage_key(tensor), [])
        if new is None and sharing:
            # A view whose making no mode sees, such as `x.T`.
            origin = self.now[id(sharing[0])]
            self.maker[value] = Op("", "alias", 0, self.time, (Ref(origin),), {}, [((0,), origin)], [((), value)])
        if known is None:
            sharing.append(tensor)
        return value

    def _overwritten(self, tensor: Tensor, by: Op) -> None:
        """Gives new values to all views of what an operation has written into."""
        sources = [value for _, value in by.inputs + by.outputs]
        for view in self.by_storage[storage_key(tensor)]:
            if view is tensor and by.outputs:
                continue
            reads: list[tuple[tuple, int]] = [((i,), value) for i, value in enumerate([self.now[id(view)], *sources])]
            value = self.now[id(view)] = len(self.tensors)
            self.tensors.append(view)
            self.maker.append(Op("", "written", 0, self.time, (), {}, reads, [((), value)]))

    def _values(self, structured: Any, new: Op | None = None) -> list[tuple[tuple, int]]:
        return [(keys, self._value(tensor, new)) for keys, tensor in tensors(structured)]

    def _refs(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return Ref(self._value(argument))
        if isinstance(argument, (tuple, list)) and type(argument) in (tuple, list):
            return type(argument)(map(self._refs, argument))
        return argument

    def enter(self, path: str, call: int, args: tuple, kwargs: dict) -> None:
        self.time += 1
        entered = Call(path, call, self.time, self._values({**dict(enumerate(args)), **kwargs}))
        if self.open:
            self.open[-1].children.append(entered)
        self.open.append(entered)

    def leave(self, path: str, call: int, args: tuple, kwargs: dict, output: Any) -> None:
        self.time += 1
        left = self.open.pop()
        left.end, left.outputs = self.time, self._values(output)
        self.calls.append(left)

    def operation(self, path: str, op: str, call: int, args: tuple, kwargs: dict, output: Any) -> None:
        self.time += 1
        inputs = self._values({**dict(enumerate(args)), **kwargs})
        refs = tuple(map(self._refs, args)), {name: self._refs(value) for name, value in kwargs.items()}
        made = Op(path, op, call, self.time, *refs, inputs, [])
        made.outputs = self._values(output, made)
        if args and isinstance(args[0], Tensor) and (op == "setitem" or (output is args[0] and op not in SAME)):
            self._overwritten(args[0], made)
        self.ops.append(made)
        if self.open:
            self.open[-1].ops.append(made)

    # What the record answers.

    def finish(self) -> Flow:
        self.calls.sort(key=lambda call: call.start)
        self.counts: dict[tuple[str, str | None], int] = {}
        for call in self.calls:
            self.counts[call.path, None] = self.counts.get((call.path, None), 0) + 1
        for op in self.ops:
            self.counts[op.path, op.name] = self.counts.get((op.path, op.name), 0) + 1
        self.uses: dict[int, list[Op]] = {}
        for op in self.ops:
            for value in op.values:
                self.uses.setdefault(value, []).append(op)
        self.returned: dict[int, list[tuple[Call, tuple]]] = {}
        for call in self.calls:
            for keys, value in call.outputs:
                self.returned.setdefault(value, []).append((call, keys))
        return self

    def shape(self, value: int) -> tuple[int, ...]:
        return tuple(self.tensors[value].shape)

    def floating(self, value: int) -> bool:
        return self.tensors[value].is_floating_point()

    def address(self, at: Call | Op, port: str, keys: tuple) -> str:
        """The canonical site of a value that a module or operation takes or gives."""
        op = at.name if isinstance(at, Op) else None
        site = Site.parse(at.path) if at.path else Site()
        call = at.call if self.counts[at.path, op] > 1 else None
        if port == "in" and keys == (0,):
            keys = ()
        return str(replace(site, op=op, call=call, port=port, keys=keys))

    def site(self, value: int, within: Call | None = None) -> str:
        """Where a value is written so that everything that uses it sees what was written.

        The output of the outermost module (inside `within`) that returns it, unless something uses it before that module ends;
        then of the operation that makes it.
        """
        best: tuple[Call, tuple] | None = None
        for call, keys in self.returned.get(value, ()):
            inside = within is None or (within.start < call.start and call.end < within.end)
            early = any(op.time < call.end for op in self._used_by(value))
            if call.path and inside and not early and (best is None or call.start < best[0].start):
                best = (call, keys)
        if best is not None:
            return self.address(best[0], "out", best[1])
        op = self.maker[value]
        if op is None or op.name in UNSEEN:
            raise LookupError
        return self.address(op, "out", next(keys for keys, made in op.outputs if made == value))

    def _used_by(self, value: int) -> list[Op]:
        """The operations that make something else of a value."""
        uses = self.uses.get(value, ())
        return [op for op in uses if op is not self.maker[value] and [made for _, made in op.outputs] != [value]]

    def behind(self, value: int, stop: Iterable[int] = (), since: int = 0) -> set[int]:
        """The values that a value is made from, itself included; not through those of `stop` or from before `since`."""
        stop = set(stop)
        found, ahead = {value}, [value]
        while ahead:
            op = self.maker[ahead.pop()]
            if op is None or op.time < since:
                continue
            new = [v for v in op.values if v not in found and v not in stop]
            found.update(new)
            ahead += new
        return found

    def normalises(self, op: Op) -> bool:
        """Whether an operation is a norm, or makes the scale of one that is written out: a root, one for each position."""
        root = op.name in SCALES or (op.name == "pow" and op.args[-1] in (0.5, -0.5))
        return op.name in NORMS or (root and bool(op.inputs) and self.shape(op.outputs[0][1])[-1:] == (1,))

    def norm_calls(self) -> Iterator[tuple[Call | Op, int, int]]:
        """Normalisations as (module call or operation, input, output): modules that do nothing but normalise one value."""
        paths = set()
        for call in self.calls:
            names = {op.name for op in call.ops}
            if call.children or len(call.outputs) != 1 or names & MIXING or not any(map(self.normalises, call.ops)):
                continue
            made = call.outputs[0][1]
            alike = {value for _, value in call.inputs if self.floating(value) and self.shape(value) == self.shape(made)}
            if len(alike) == 1:
                paths.add(call.path)
                yield call, alike.pop(), made
        for op in self.ops:
            if op.name in NORMS and op.path not in paths:
                yield op, op.inputs[0][1], op.outputs[0][1]

    def value_at(self, site: str) -> int | None:
        """The value that a module or operation returns at an address."""
        places: list[Call | Op] = [*self.calls, *self.ops]
        for at in places:
            for keys, value in at.outputs:
                if self.address(at, "out", keys) == site:
                    return value
        return None

    def moved_only(self, value: int, source: int, since: int) -> bool:
        """Whether a value is the source, or some positions of it."""
        while value != source:
            op = self.maker[value]
            if op is None or op.time < since or op.name not in MOVED or not op.inputs:
                return False
            value = op.inputs[0][1]
        return True


def record(f: FunctionalModel, params: Any, inputs: Any) -> Flow:
    """The flow of one run, on fake tensors where the model allows it."""

    def run(params: Any, inputs: Any) -> Flow:
        flow = Flow(params)
        f._run(params, inputs, (), Execution(observer=flow))
        return flow.finish()

    return run_abstract_or_real(f, run, params, inputs)[0]
