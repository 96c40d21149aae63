"""How heads lie in a value: the operations that only move numbers, run again on the numbers' places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .flow import Flow, Op, Ref

MOVES = {
    "view", "reshape", "transpose", "permute", "split", "split_with_sizes", "chunk", "tensor_split", "getitem", "unflatten",
    "flatten", "unbind", "squeeze", "unsqueeze", "narrow", "select", "movedim", "moveaxis", "swapaxes", "swapdims", "t",
    "expand", "repeat_interleave", "index_select", "rearrange",
}  # fmt: skip


def origins(flow: Flow, seeds: dict[int, Tensor], since: int, until: int) -> dict[int, Tensor]:
    """For each value that the seeds reach unmixed, where its numbers come from, an integer tensor of its shape.

    An operation that moves numbers is run again on their places. One that keeps the shape is taken to work number by number (a
    scale, a rotation by position, a norm of each head), so the places stay.
    """
    known = dict(seeds)
    for op in flow.ops:
        if not since < op.time <= until:
            continue
        sources = [value for value in dict.fromkeys(op.values) if value in known]
        if not sources:
            continue
        if op.name in MOVES:
            known.update(_replayed(op, known))
            continue
        for _, value in op.outputs:
            places = known[sources[0]]
            alike = all(known[s].shape == places.shape and torch.equal(known[s], places) for s in sources[1:])
            if value not in known and alike and flow.shape(value) == tuple(places.shape):
                known[value] = places
    return known


def _replayed(op: Op, known: dict[int, Tensor]) -> dict[int, Tensor]:
    """What `op` makes of the places of its inputs; nothing where it cannot be told."""

    def real(argument: Any) -> Any:
        if isinstance(argument, Ref):
            return known[argument.value]
        return type(argument)(map(real, argument)) if type(argument) in (tuple, list) else argument

    name = {"view": "reshape", "getitem": "__getitem__", "split_with_sizes": "split"}.get(op.name, op.name)
    try:
        args, kwargs = real(op.args), {key: real(value) for key, value in op.kwargs.items()}
        result = getattr(torch.Tensor, name)(*args, **kwargs)
    except Exception:
        return {}
    made: dict[int, Tensor] = {}
    for keys, value in op.outputs:
        part = result
        for key in keys:
            part = part[key]
        made[value] = part
    return made


def numbered(flow: Flow, value: int, *axes: int) -> Tensor:
    """Places for a value: its numbers counted along `axes`, the same along all others."""
    shape = flow.shape(value)
    axes = tuple(axis % len(shape) for axis in axes)
    sizes = [shape[axis] for axis in axes]
    count = torch.arange(int(torch.tensor(sizes).prod())).reshape(sizes)
    spread = [shape[axis] if axis in axes else 1 for axis in range(len(shape))]
    return count.reshape(spread).expand(shape)


def table(places: Tensor, size: int) -> Tensor | None:
    """The places of heads, Tensor [heads, size], where a value has an axis of heads and one of features; else None."""
    axes = [axis for axis in range(places.ndim) if not torch.equal(places, places.narrow(axis, 0, 1).expand_as(places))]
    for axis in reversed(range(places.ndim)):
        if axis not in axes:
            places = places.select(axis, 0)
    if places.ndim == 1 and len(places) == size:
        return places[None]
    if places.ndim == 2 and places.shape[1] != size:
        places = places.mT
    return places if places.ndim == 2 and places.shape[1] == size else None


def _once(places: Tensor, heads: int) -> Tensor:
    """The first `heads` rows, if the others repeat them."""
    again, left = divmod(len(places), heads)
    return places[:heads] if not left and torch.equal(places, places[:heads].repeat(again, 1)) else places


def regular(places: Tensor) -> tuple[tuple[int, ...], int] | None:
    """(starts, step) of heads whose features are evenly spaced; else None."""
    step = int(places[0, 1] - places[0, 0]) if places.shape[1] > 1 else 1
    expected = places[:, :1] + step * torch.arange(places.shape[1])
    return (tuple(places[:, 0].tolist()), step) if step > 0 and torch.equal(places, expected) else None


def heads_from(
    flow: Flow, source: int, read: int, since: int, until: int, *, heads: int | None = None, size: int | None = None
) -> tuple[tuple[int, ...], int, int] | None:
    """(starts, step, size) of the heads that reach a value, in the last axis of the value that they come from.

    Args:
        flow: the run.
        source: the value, such as what a fused projection returns.
        read: what the attention operation gets, whose numbers come from `source`.
        since: time from which on to follow.
        until: time up to which.
        heads: how many there are, or
        size: features of one head.
    """
    known = origins(flow, {source: numbered(flow, source, -1)}, since, until)
    used: set[int] = set()
    seen, ahead = {read}, [read]
    while ahead:
        value = ahead.pop()
        if value in known:
            used.update(known[value].unique().tolist())
            continue
        op = flow.maker[value]
        if op is not None and op.time > since:
            new = [v for v in op.values if v not in seen]
            seen.update(new)
            ahead += new
    size = len(used) // heads if size is None and heads else size
    if not size:
        return None
    for places in known.values():  # in the order of time: before grouped heads are repeated
        found = table(places, size)
        if found is None or set(found.flatten().tolist()) != used:
            continue
        # Where the batch is joined with the heads, they come again for each example.
        found = _once(found, len(used) // size)
        if found.numel() == len(used):
            layout = regular(found)
            return None if layout is None else (*layout, size)
    return None
