"""The blocks of a transformer, and what each of them adds to the residual stream: found by following the values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ...core.errors import SiteError
from .flow import Call, Flow, Op, Ref

PRODUCTS = {"matmul", "mm", "bmm", "baddbmm", "einsum"}
FUSED = {"scaled_dot_product_attention", "multi_head_attention_forward", "flex_attention"}


@dataclass
class Core:
    """Where tokens exchange information: fused attention, or a softmax whose result multiplies the values.

    Attributes:
        op: the fused operation or the softmax.
        query, key, value: what goes in; None inside of `multi_head_attention_forward`.
        mixed: the result, before the output projection.
        pattern: the probabilities as they multiply the values, with the axes of the softmax; None where fused.
    """

    op: Op
    query: int | None
    key: int | None
    value: int | None
    mixed: int
    time: int
    pattern: int | None = None


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
                product, pattern = mix
                weighed = next(v for v in product.values if pattern not in flow.behind(v, since=op.time))
                query, key = [v for v in scores.values if flow.floating(v)][-2:]
                found.append(Core(op, query, key, weighed, product.outputs[0][1], product.time, pattern))
    return found


def _mix(flow: Flow, softmax: Op) -> tuple[Op, int] | None:
    """The product of attention probabilities and values, and the probabilities as they come there."""
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
                    return op, pattern
            elif made != value and flow.shape(made)[:-1] == flow.shape(start)[:-1]:
                ahead.append((made, made))
            elif made != value and op.name in ("view", "reshape"):
                ahead.append((made, pattern))
    return None


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
        if not chosen:
            raise SiteError(f"blocks={given!r}: none of these modules ran and returned a value of the shape that it got.")
        return chosen
    groups: dict[str, list[Block]] = {}
    for call in flow.calls:
        block = _as_block(flow, call)
        parent, _, last = call.path.rpartition(".")
        attends = block is not None and any(block.holds(core.time) for core in cores)
        if block is not None and last.isdecimal() and (call.children or attends):
            groups.setdefault(parent, []).append(block)
    stacks = {p: g for p, g in groups.items() if any(b.holds(core.time) for b in g for core in cores)}
    outer = {
        parent: stack
        for parent, stack in stacks.items()
        if not any(b.holds(stack[0].start) for other, blocks in stacks.items() if other != parent for b in blocks)
    }
    if len(outer) == 1:
        return next(iter(outer.values()))
    if outer:
        shown = ", ".join(repr(f"{parent}.*") for parent in outer)
        raise SiteError(f"the model has several stacks of blocks: {shown}; say which with blocks='{next(iter(outer))}.*'.")
    raise SiteError(
        "no blocks were found: numbered modules (of a ModuleList, say) that return a value of the shape that they got, with "
        "attention (a softmax that multiplies values, or a fused attention operation) inside; give blocks='path.*'."
    )


def _as_block(flow: Flow, call: Call) -> Block | None:
    """The call with the first floating input that an output equals in shape and type."""
    for taken in call.inputs:
        for returned in call.outputs:
            first, second = flow.tensors[taken[1]], flow.tensors[returned[1]]
            fits = first.is_floating_point() and first.ndim >= 2 and first.shape == second.shape and first.dtype == second.dtype
            if fits and taken[1] != returned[1]:
                return Block(call, taken, returned)
    return None


def decompose(flow: Flow, block: Block, norms: dict[int, int]) -> None:
    """Walks from the output of a block back to its input, and notes what was added on the way.

    Of the two parts of a sum the stream is the one that the input reaches by sums alone; after a norm the one that the other
    is computed from.

    Args:
        flow: the run.
        block: gets `stream`, `writes` and `normed`.
        norms: from the output of each norm to its input.
    """
    start, end = block.input[1], block.output[1]
    value, block.stream = end, [end]
    while value != start:
        op = flow.maker[value]
        if op is None or op.time < block.start:
            raise SiteError(f"the output of {block.call.path!r} does not lead back to its input by sums and norms")
        parts = _summands(flow, op, value)
        if value in norms:
            value, block.normed = norms[value], True
        elif parts is not None:
            stream, write = _stream_first(flow, block, start, *parts)
            block.writes.insert(0, write)
            value = stream
        else:
            same = [v for v in op.values if v not in flow.weights and math.prod(flow.shape(v)) == math.prod(flow.shape(value))]
            if len(same) != 1:
                raise SiteError(
                    f"the residual stream of {block.call.path!r} goes through {flow.address(op, 'out', ())!r}, which is no sum"
                )
            value = same[0]
        block.stream.append(value)


def _summands(flow: Flow, op: Op, value: int) -> tuple[int, int] | None:
    whole = [v for v in op.values if flow.shape(v) == flow.shape(value)]
    return (whole[0], whole[1]) if op.name == "add" and len(op.inputs) == 2 and len(whole) == 2 else None


def _stream_first(flow: Flow, block: Block, start: int, a: int, b: int) -> tuple[int, int]:
    def by_sums(value: int) -> bool:
        op = flow.maker[value]
        if value == start:
            return True
        parts = _summands(flow, op, value) if op is not None and op.time > block.start else None
        return parts is not None and any(map(by_sums, parts))

    first, second = by_sums(a), by_sums(b)
    if first == second:
        first = a in flow.behind(b, since=block.start)
        second = b in flow.behind(a, since=block.start)
    if first == second:
        raise SiteError(f"a sum in {block.call.path!r} adds two values of which neither is known to be the residual stream")
    return (a, b) if first else (b, a)


def split_parallel(flow: Flow, block: Block, cores: list[Core]) -> None:
    """A single write that is the sum of attention and something else becomes two."""
    if len(block.writes) != 1:
        return
    write = block.writes[0]
    op = flow.maker[write]
    parts = _summands(flow, op, write) if op is not None else None
    if parts is None:
        return
    mixed = {core.mixed for core in cores if block.holds(core.time)}
    attends = [bool(mixed & flow.behind(part, block.stream, block.start)) for part in parts]
    if attends[0] != attends[1]:
        block.writes = list(parts) if attends[0] else [parts[1], parts[0]]


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
