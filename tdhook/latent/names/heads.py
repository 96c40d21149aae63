"""Queries, keys, values and outputs of attention heads: where they are, and how they lie there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .blocks import Block, Core, Linear, linears_behind
from .flow import Call, Flow
from .layout import HeadLayout, Projection
from .origins import heads_from, numbered, origins, regular

WITHOUT_WORK = ("view", "reshape", "transpose", "size", "to", "contiguous", "flatten")


@dataclass
class Found:
    """The entries of `Names` so far, and why others are missing."""

    entries: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    reads_normed: list[bool] = field(default_factory=list)
    writes_normed: list[bool] = field(default_factory=list)

    def lack(self, reason: str, *names: str) -> None:
        for name in names:
            self.missing.setdefault(name, reason)


def site_of(flow: Flow, value: int, within: Call | None) -> str | None:
    """`flow.site`, or None for a value that no module or operation returns."""
    try:
        return flow.site(value, within)
    except LookupError:
        return None


def attention_heads(flow: Flow, block: Block, core: Core, found: Found) -> dict[str, Any]:
    """Queries, keys, values and the pattern."""
    entries: dict[str, Any] = {"attention_operation": flow.address(core.op, "out", core.op.outputs[0][0])}
    if core.query is None or core.key is None or core.value is None:
        entries["heads"] = core.op.args[4]
        found.lack("torch computes this attention inside of one function",
                   "query", "key", "value", "pattern", "head_output", "output_projection")  # fmt: skip
        return entries
    if core.pattern is not None:
        entries["pattern"] = site_of(flow, core.pattern, block.call)
        shape = flow.shape(core.op.outputs[0][1])
    else:
        found.lack("a fused kernel never forms it; latent.lenses.attention_patterns computes it", "pattern")
        shape = flow.shape(core.query)
    counted = {"heads": shape[-3]} if len(shape) > 3 else {"size": flow.shape(core.query)[-1]}
    for name in ("query", "key", "value"):
        if name == "value":
            counted = {"size": flow.shape(core.mixed)[-1]}
        entries[name] = _projected(flow, block, core, getattr(core, name), counted)
        if entries[name] is None:
            found.lack(f"the {name} of attention is not one linear map of the stream whose heads lie evenly", name)
        if name == "query":
            counted = {"size": entries[name].size if entries[name] else flow.shape(core.query)[-1]}
    if len(shape) > 3:
        entries["heads"] = shape[-3]
    elif entries["query"] is not None:
        entries["heads"] = entries["query"].heads
    else:
        entries["heads"] = max(1, shape[0] // flow.shape(block.input[1])[0]) if len(shape) == 3 else 1
    return entries


def _projected(flow: Flow, block: Block, core: Core, read: int, counted: dict[str, int]) -> HeadLayout | None:
    maps = linears_behind(flow, read, block.start)
    if len(maps) != 1:
        return None
    site, value = returned(flow, maps[0])
    heads = heads_from(flow, value, read, maps[0].op.time, core.time, **counted)
    return None if heads is None else HeadLayout(site, heads[0], heads[2], heads[1])


def attention_output(flow: Flow, core: Core, projection: Linear | None, heads: int | None, found: Found) -> dict[str, Any]:
    """The heads that the output projection reads, and the projection."""
    if core.query is None:
        return {}
    if projection is None:
        found.lack("attention does not end with one linear map", "head_output", "output_projection")
        return {}
    entries: dict[str, Any] = {"output_projection": projection_of(flow, projection)}
    mixed = flow.shape(core.mixed)
    places = numbered(flow, core.mixed, *((core.axis, -1) if len(mixed) > 3 or heads == mixed[0] else (-1,)))
    if len(mixed) == 3 and heads not in (1, mixed[0]) and heads:
        # [B * H, S, d]: the head is the remainder of the first axis.
        places = numbered(flow, core.mixed, 0, -1) % (heads * mixed[-1])
    known = origins(flow, {core.mixed: places}, core.time, projection.op.time)
    read = known.get(projection.input)
    layout = None
    if read is not None:
        for axis in range(read.ndim - 1):
            read = read.narrow(axis, 0, 1)
        order = read.flatten().argsort().reshape(-1, mixed[-1])
        layout = regular(order)
    if layout is None or len(layout[0]) != heads:
        found.lack("the heads do not lie evenly in what the output projection reads", "head_output")
    else:
        entries["head_output"] = HeadLayout(entries["output_projection"].input, layout[0], mixed[-1], layout[1])
    return entries


def returned(flow: Flow, map_: Linear) -> tuple[str, int]:
    """Site and value of what a linear map returns: of its module, where it is one."""
    call = _module(flow, map_)
    if call is None:
        return flow.address(map_.op, "out", ()), map_.output
    return flow.address(call, "out", ()), call.outputs[0][1]


def projection_of(flow: Flow, map_: Linear) -> Projection:
    """A linear map, with the sites of what it reads and returns."""
    call = _module(flow, map_)
    if call is None:
        read = next(keys for keys, value in map_.op.inputs if value == map_.input)
        source = flow.address(map_.op, "in", read)
    else:
        source = flow.address(call, "in", call.inputs[0][0])
    return Projection(returned(flow, map_)[0], source, map_.weight, map_.bias, map_.transposed)


def _module(flow: Flow, map_: Linear) -> Call | None:
    """The call of a module that does nothing but this linear map, up to views."""
    for call in flow.calls:
        if call.path == map_.op.path and call.start < map_.op.time < call.end:
            work = [op for op in call.ops if op.name not in WITHOUT_WORK]
            single = work == [map_.op] and not call.children and len(call.inputs) == 1 and len(call.outputs) == 1
            return call if single and call.outputs[0][0] == () else None
    return None
