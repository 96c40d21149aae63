"""The blocks of a transformer, its attention operations and its linear maps: found by following the values."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from ...core.errors import SiteError
from .flow import FUSED, PRODUCTS, Call, Flow, Op, Ref


@dataclass
class Core:
    """Where tokens exchange information: fused attention, or a softmax whose result multiplies the values.

    Attributes:
        op: the fused operation or the softmax.
        query, key, value: what goes in; None inside of `multi_head_attention_forward`.
        mixed: the result, before the output projection.
        pattern: the probabilities as they multiply the values, with the axes of the softmax; None where fused.
        axis: of the heads in the result.
    """

    op: Op
    query: int | None
    key: int | None
    value: int | None
    mixed: int
    time: int
    pattern: int | None = None
    axis: int = -3


@dataclass
class Linear:
    """A linear map by a parameter. `transposed` as in `Projection`."""

    op: Op
    input: int
    output: int
    weight: str
    bias: str | None
    transposed: bool


@dataclass
class Block:
    """One block: its input and output, and the parts of the difference.

    Attributes:
        stream: the values of the residual stream, from the output back to the input.
        writes: what was added to it, in the order of the run.
        normed: whether the stream itself is normalised on the way.
    """

    call: Call
    input: tuple[tuple, int]
    output: tuple[tuple, int]
    stream: list[int] = field(default_factory=list)
    writes: list[int] = field(default_factory=list)
    normed: bool = False

    @property
    def start(self) -> int:
        return self.call.start

    def holds(self, time: int) -> bool:
        return self.call.start < time < self.call.end


def find_cores(flow: Flow) -> list[Core]:
    """Every attention operation. A softmax over anything else (a router of experts, say) multiplies no other activation."""
    found = []
    for op in flow.ops:
        floats = [value for value in op.values if flow.floating(value)]
        if op.name in FUSED:
            inside = op.name == "multi_head_attention_forward"
            query, key, value = (None, None, None) if inside else floats[:3]
            found.append(Core(op, query, key, value, op.outputs[0][1], op.time))
        elif op.name == "softmax":
            mix, scores = _mix(flow, op), _product_behind(flow, floats[0])
            if mix is not None and scores is not None:
                product, pattern, axis = mix
                weighed = next(v for v in product.values if pattern not in flow.behind(v, since=op.time))
                query, key = [v for v in scores.values if flow.floating(v)][-2:]
                found.append(Core(op, query, key, weighed, product.outputs[0][1], product.time, pattern, axis))
    return found


def _mix(flow: Flow, softmax: Op) -> tuple[Op, int, int] | None:
    """The product of attention probabilities and values, the probabilities as they come there, and the axis of its heads."""
    start = softmax.outputs[0][1]
    ahead = [(start, start)]
    while ahead:
        value, pattern = ahead.pop()
        for op in flow.uses.get(value, ()):
            if op.time <= softmax.time or not op.outputs:
                continue
            made = op.outputs[0][1]
            if op.name in PRODUCTS:
                others = [v for v in op.values if v != value and flow.floating(v)]
                if others and not any(v in flow.weights for v in others):
                    return op, pattern, _head_axis(op, value)
            elif made != value and flow.shape(made)[:-1] == flow.shape(start)[:-1]:
                ahead.append((made, made))
            elif made != value and op.name in ("view", "reshape"):
                ahead.append((made, pattern))
    return None


def _head_axis(product: Op, pattern: int) -> int:
    """Where the axis that the pattern [..., head, query, key] has for heads is in the product."""
    if product.name != "einsum" or not isinstance(product.args[0], str):
        return -3
    taken, _, made = product.args[0].replace(" ", "").partition("->")
    letter = taken.split(",")[product.values.index(pattern)][-3:-2]
    return made.index(letter) - len(made) if letter.isalpha() and letter in made else -3


def _product_behind(flow: Flow, value: int) -> Op | None:
    """The nearest product of two activations that a value is made from."""
    made = [op for v in flow.behind(value) if (op := flow.maker[v]) is not None and op.name in PRODUCTS]
    made = [op for op in made if linear(flow, op) is None]
    return max(made, key=lambda op: op.time, default=None)


def linear(flow: Flow, op: Op) -> Linear | None:
    """An operation as a linear map by a parameter, or None."""
    place = {"linear": (0, 1, 2), "addmm": (1, 2, 0), "matmul": (0, 1, None), "mm": (0, 1, None)}.get(op.name)
    if place is None:
        return None
    names = {"linear": ("input", "weight", "bias"), "addmm": ("mat1", "mat2", "input")}.get(op.name, ("input", "mat2", ""))
    read, weight, bias = (
        op.args[i] if i is not None and i < len(op.args) else op.kwargs.get(name) for i, name in zip(place, names)
    )
    if not isinstance(read, Ref) or not isinstance(weight, Ref):
        return None
    stored = _parameter(flow, weight.value)
    if stored is None or len(flow.shape(weight.value)) != 2:
        return None
    name, same = stored
    offset = flow.weights.get(bias.value) if isinstance(bias, Ref) else None
    return Linear(op, read.value, op.outputs[0][1], name, offset, same if op.name == "linear" else not same)


def _parameter(flow: Flow, value: int) -> tuple[str, bool] | None:
    """The name of the parameter that a matrix is, and whether as stored or transposed."""
    used = flow.tensors[value]
    while value not in flow.weights:
        op = flow.maker[value]
        if op is None or op.name not in ("alias", "t", "transpose", "permute", "swapaxes", "to", "contiguous") or not op.inputs:
            return None
        value = op.inputs[0][1]
    stored = flow.tensors[value]
    return flow.weights[value], used.shape == stored.shape and used.stride() == stored.stride()


def find_blocks(flow: Flow, cores: list[Core], given: list[str] | None) -> list[Block]:
    """The repeated modules that pass the residual stream on. Raises `SiteError` where there are none, or several stacks."""
    if given is not None:
        chosen = [block for call in flow.calls if call.path in given and (block := _as_block(flow, call)) is not None]
        others = [path for path in given if path not in {block.call.path for block in chosen}]
        if others:
            raise SiteError(f"blocks has {others[0]!r}, which never ran, or returned no value of the shape that it got.")
        return chosen

    def attends(block: Block) -> bool:
        return any(block.holds(core.time) for core in cores)

    groups: dict[str, list[Block]] = {}
    for call in flow.calls:
        block = _as_block(flow, call)
        parent, _, last = call.path.rpartition(".")
        if block is not None and last.isdecimal() and (call.children or attends(block)):
            groups.setdefault(parent, []).append(block)
    stacks = {parent: group for parent, group in groups.items() if any(map(attends, group))}
    outer = _outermost(stacks)
    while len(outer) == 1:
        (stack,) = outer.values()
        inner = {p: blocks for p, blocks in stacks.items() if len(stack) == 1 and stack[0].holds(blocks[0].start)}
        if not inner or not all(map(attends, itertools.chain(*inner.values()))):
            return stack
        outer = _outermost(inner)  # a whole encoder that is a numbered module, as in nn.Sequential, is no block
    if outer:
        shown = ", ".join(repr(f"{parent}.*") for parent in outer)
        raise SiteError(f"the model has several stacks of blocks: {shown}; say which with blocks='{next(iter(outer))}.*'.")
    raise SiteError(
        "no blocks were found: numbered modules (of a ModuleList, say) that return a value of the shape that they got, with "
        "attention (a softmax that multiplies values, or a fused attention operation) inside; give blocks='path.*'."
    )


def _outermost(stacks: dict[str, list[Block]]) -> dict[str, list[Block]]:
    """The stacks that lie in no block of another."""
    return {
        parent: stack
        for parent, stack in stacks.items()
        if not any(b.holds(stack[0].start) for other, blocks in stacks.items() if other != parent for b in blocks)
    }


def _as_block(flow: Flow, call: Call) -> Block | None:
    """The call with the first floating input that an output equals in shape and type."""
    for taken in call.inputs:
        for returned in call.outputs:
            first, second = flow.tensors[taken[1]], flow.tensors[returned[1]]
            fits = first.is_floating_point() and first.ndim >= 2 and first.shape == second.shape and first.dtype == second.dtype
            if fits and taken[1] != returned[1]:
                return Block(call, taken, returned)
    return None


def last_linear(flow: Flow, write: int, since: int, source: int) -> Linear | None:
    """The linear map that a write ends with, before norms, scales and dropout; of what comes from the value `source`."""
    value = write
    while True:
        op = flow.maker[value]
        if op is None or op.time < since:
            return None
        found = linear(flow, op)
        if found is not None:
            return found
        sources = [v for v in dict.fromkeys(op.values) if flow.floating(v) and v not in flow.weights]
        sources = [v for v in sources if source in flow.behind(v, since=since)]
        if len(sources) > 1:
            # A norm reads its input twice: the one that the other is computed from comes first.
            sources = [v for v in sources if all(v in flow.behind(other, since=since) for other in sources)]
        if len(sources) != 1:
            return None
        value = sources[0]


def linears_behind(flow: Flow, value: int, since: int) -> list[Linear]:
    """The nearest linear maps of activations of the block that a value is made from."""
    found: dict[int, Linear] = {}
    seen, ahead = {value}, [value]
    while ahead:
        op = flow.maker[ahead.pop()]
        if op is None or op.time < since:
            continue
        map_ = linear(flow, op)
        if map_ is not None:
            found[map_.output] = map_
            continue
        new = [v for v in op.values if v not in seen]
        seen.update(new)
        ahead += new
    return list(found.values())
