"""What a block adds to the residual stream: the summands between its output and its input."""

from __future__ import annotations

import math

from ...core.errors import SiteError
from .blocks import Block, Core
from .flow import MOVED, SAME, UNSEEN, Flow, Op

# What a residual stream may go through and stay what it is: views, masks, and operations that only matter in half precision.
PASSING = {
    *SAME, *MOVED, *UNSEEN, "transpose", "permute", "movedim", "swapaxes", "squeeze", "unsqueeze", "clone", "half", "bfloat16",
    "double", "clamp", "where", "masked_fill", "mul", "div",
}  # fmt: skip


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
            if op.name not in PASSING or len(same) != 1 or (not block.normed and _scales(flow, block, op, same[0])):
                raise SiteError(
                    f"the residual stream of {block.call.path!r} goes through {flow.address(op, 'out', ())!r}, which is no sum"
                )
            value = same[0]
        block.stream.append(value)


def _scales(flow: Flow, block: Block, op: Op, stream: int) -> bool:
    """Whether an operation multiplies the stream by a number or a parameter, after which it is no sum of what was written."""
    others = [v for v in op.values if v != stream]
    by = set().union(*(flow.behind(v, since=block.start) for v in others))
    return op.name in ("mul", "div") and (not others or any(v in flow.weights for v in by))


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
