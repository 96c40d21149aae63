"""Patches: what is written at a site, for the whole of it or for one place in it (a position, a head, a neuron) at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ..core.batching import vmap_or_loop
from ..core.compat import visible
from ..core.errors import InputError, SiteError, TargetError
from ..core.functional import FunctionalModel
from ..core.replay import Tape
from ..core.sites import SiteLike, Tree, Want
from ..core.structure import describe
from ..core.transforms import require_sites
from .names.layout import HeadLayout

Where = SiteLike | HeadLayout | Sequence[SiteLike | HeadLayout | None]
Axis = int | Sequence[int] | None
Indices = Sequence[int] | Sequence[Sequence[int] | None] | None
Source = Tensor | Callable[[Tensor], Tensor]
Metric = Callable[[Any], Tensor]


@dataclass(frozen=True)
class View:
    """What is looked at of the value at a site: all of it, or with a layout its heads, as [..., heads, size]."""

    want: Want
    layout: HeadLayout | None = None

    @property
    def name(self) -> str:
        return str(self.want.site)

    def of(self, value: Tensor) -> Tensor:
        return value if self.layout is None else self.layout.split(value)

    def within(self, value: Tensor, part: Tensor) -> Tensor:
        """`value` with `part` in it."""
        return part if self.layout is None else self.layout.merge(value, part)


def views(f: FunctionalModel, sites: Where, name: str = "sites") -> tuple[View, ...]:
    """The sites resolved; patterns over modules stand for all that they match. Raises `SiteError` for several values at one."""
    require_sites(f)
    if isinstance(sites, (Mapping, TensorDictBase)):
        raise SiteError(
            f"{name} is {describe(sites)}; give addresses alone, and positions, which are the same for all of them."
        )
    found: dict[View, None] = {}
    for where in [sites] if isinstance(sites, str) or not isinstance(sites, Iterable) else sites:
        if where is None:
            raise SiteError(f"{name} holds None: tdhook.latent.names did not find a site; print the names to see the reason.")
        layout = where if isinstance(where, HeadLayout) else None
        for want in _one_value_each(f.tree, where if layout is None else layout.site, name):
            found[View(want, layout)] = None
    if not found:
        raise SiteError(f"{name} is empty: no site was given; give at least one, such as 'h.3.mlp'.")
    return tuple(found)


@torch.compiler.assume_constant_result
def _one_value_each(tree: Tree, site: SiteLike, name: str) -> tuple[Want, ...]:
    wants = tuple(Want(want.site, str(want.site), exact=True) for want in tree.resolve(site))
    for want, asked in zip(wants, tree.resolve(site)):
        if want.site.op == "*" or want.site.call == "*":
            raise SiteError(f"{name} has {asked.request!r}, which stands for several values; list them, as tdhook.trace does.")
    return wants


def wants_of(*groups: Sequence[View]) -> tuple[Want, ...]:
    """The sites to read for some views, each once."""
    return tuple(dict.fromkeys(view.want for group in groups for view in group))


# Places ----------------------------------------------------------------------------------------------------------------


def as_axes(axis: Axis, name: str = "axis") -> tuple[int, ...]:
    axes: Any = () if axis is None else tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    if not all(isinstance(a, int) and not isinstance(a, bool) for a in axes) or len(set(axes)) < len(axes):
        raise InputError(f"{name}={axis!r} is no axis; give a number, several different ones, or None for whole values.")
    return axes


def grid(view: View, value: Tensor, axes: tuple[int, ...], indices: Indices, name: str = "positions") -> list[list[int]]:
    """For each axis of the view the indices to go through, counted from 0."""
    if not axes:
        if indices is not None:
            raise InputError(f"{name}={indices!r} count along an axis; give axis too.")
        return []
    lists: Any = [None] * len(axes) if indices is None else indices
    if len(axes) == 1 and not (_is_list(lists) and len(lists) == 1 and _is_list(lists[0])):
        lists = [indices]
    count = len(lists) if isinstance(lists, Sequence) else 1
    if count != len(axes):
        raise InputError(f"{name} has {count} entries for {len(axes)} axes; give for each a sequence, or None for all.")
    part = view.of(value)
    for axis in axes:
        if not -part.ndim <= axis < part.ndim:
            raise InputError(f"axis={axis} is out of range at {view.name!r}, which holds {describe(part)}.")
    if len({axis % part.ndim for axis in axes}) < len(axes):
        raise InputError(f"axis={axes} means one axis twice at {view.name!r}, which holds {describe(part)}.")
    return [_along(view, part.shape[axis], each, name) for axis, each in zip(axes, lists)]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _along(view: View, length: int, indices: Any, name: str) -> list[int]:
    if indices is None:
        return list(range(length))
    chosen = indices.tolist() if hasattr(indices, "tolist") else indices
    if not isinstance(chosen, Sequence) or not all(isinstance(i, int) and not isinstance(i, bool) for i in chosen):
        raise InputError(f"{name} has {describe(indices)} for one axis; give a sequence of integers, such as [0, -1].")
    if not chosen:
        raise InputError(f"{name} is empty; give at least one, or None for all.")
    for index in chosen:
        if not -length <= index < length:
            raise InputError(f"{name} has {index}, out of range for {length} positions at {view.name!r}.")
    return [index % length for index in chosen]


def same_grids(seen: Sequence[View], values: Mapping[Want, Tensor], axes: tuple[int, ...], indices: Indices) -> list[Any]:
    """The grid of every view; raises `InputError` where they differ in size, so that results could not be stacked."""
    grids = [grid(view, values[view.want], axes, indices) for view in seen]
    if len({tuple(map(len, each)) for each in grids}) > 1:
        raise InputError(
            "positions=None needs the same length along axis at all sites; give positions, or call once per group."
        )
    return grids


def at_place(part: Tensor, axes: tuple[int, ...], place: Tensor) -> Tensor:
    """Which numbers of a part lie at a place, an index for each axis: a bool tensor that broadcasts to the part."""
    mask = torch.ones((), dtype=torch.bool, device=part.device)
    for number, axis in enumerate(axes):
        indices = torch.arange(part.shape[axis], device=part.device)
        mask = mask & (indices == place[number]).reshape(-1, *[1] * (part.ndim - 1 - axis % part.ndim))
    return mask


def at_indices(part: Tensor, axes: tuple[int, ...], lists: Sequence[Sequence[int]]) -> Tensor:
    """Which numbers of a part lie at any of some indices along each axis: a bool tensor that broadcasts to the part."""
    mask = torch.ones((), dtype=torch.bool, device=part.device)
    for axis, chosen in zip(axes, lists):
        indices = torch.arange(part.shape[axis], device=part.device)
        here = (indices[:, None] == torch.tensor(list(chosen), device=part.device)).any(1)
        mask = mask & here.reshape(-1, *[1] * (part.ndim - 1 - axis % part.ndim))
    return mask


# Writes ----------------------------------------------------------------------------------------------------------------

Mask = Callable[[Tensor], Tensor]


def writes(patches: Sequence[tuple[View, Source, Mask | None]]) -> dict[Want, Callable[[Tensor], Tensor]]:
    """Writes for `Tape.resume`: at each view the source, or a function of what is there, where the mask is true."""
    table: dict[Want, Callable[[Tensor], Tensor]] = {}
    for view, source, mask in patches:
        table[view.want] = _write(view, source, mask, table.get(view.want))
    return table


def _write(view: View, source: Source, mask: Mask | None, before: Callable | None) -> Callable[[Tensor], Tensor]:
    def write(value: Tensor) -> Tensor:
        value = value if before is None else before(value)
        there = view.of(value)
        new = source(there) if callable(source) else source
        return view.within(value, new if mask is None else torch.where(mask(there), new, there))

    return write


def require_metric(metric: Any) -> None:
    """Raises `InputError` unless a metric can be called."""
    if not callable(metric):
        raise InputError(f"metric is {describe(metric)}; give a function of the output to a floating-point tensor [] or [B].")


def measured(metric: Metric, output: Any) -> Tensor:
    """The metric of an output; raises `TargetError` unless it is a tensor [] or [B]."""
    value = metric(output)
    if not isinstance(value, Tensor) or value.ndim > 1 or not value.is_floating_point():
        raise TargetError(f"metric returned {describe(value)}; return a floating-point tensor of shape [] or [B].")
    return value


def sweep(
    base: Tape,
    metric: Metric,
    base_metric: Tensor,
    patches: Sequence[tuple[View, Tensor]],
    axes: tuple[int, ...],
    lists: Sequence[Sequence[int]],
    chunk_size: int | None,
) -> Tensor:
    """The metric with each place in turn taken from the sources, in all of the patches at once: [*P, *M]."""

    def patched(mask: Mask | None) -> Tensor:
        return metric(base.resume(writes([(view, source, mask) for view, source in patches])))

    return at_each_place(base, patched, base_metric, patches, axes, list(itertools.product(*lists)), chunk_size).unflatten(
        0, [len(each) for each in lists] or [1]
    )[(...,) if lists else 0]


def at_each_place(
    base: Tape,
    patched: Callable[[Mask | None], Tensor],
    base_metric: Tensor,
    patches: Sequence[tuple[View, Tensor]],
    axes: tuple[int, ...],
    places: Sequence[tuple[int, ...]],
    chunk_size: int | None,
) -> Tensor:
    """`patched(mask of the place)` for each of N places, [N, *M]; where nothing would change, the metric of the base."""
    if not axes:
        return patched(None)[None]
    run = that_change_something(base, patches, axes, places)
    if not run:
        return base_metric.expand(len(places), *base_metric.shape)

    def at(place: Tensor) -> Tensor:
        return patched(lambda part: at_place(part, axes, place))

    values = vmap_or_loop(at, as_tensor([places[i] for i in run], base_metric.device), chunk_size)
    if len(run) == len(places):
        return values
    everything = base_metric.expand(len(places), *base_metric.shape).clone()
    everything[torch.tensor(run)] = values
    return everything


def as_tensor(places: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    return torch.tensor([list(place) for place in places], device=device)


def that_change_something(
    base: Tape, patches: Sequence[tuple[View, Tensor]], axes: tuple[int, ...], places: Sequence[tuple[int, ...]]
) -> list[int]:
    """Which places differ from what is there. All of them where values cannot be looked at or carry derivatives."""
    changes: set[int] = set()
    for view, source in patches:
        part = view.of(base.values[view.want])
        if not visible(part, source) or part.requires_grad or source.requires_grad:
            return list(range(len(places)))
        counted = [axis % part.ndim for axis in axes]
        rest = [axis for axis in range(part.ndim) if axis not in counted]
        differs = (part != source).permute(*counted, *rest)
        differs = differs.reshape(*differs.shape[: len(counted)], -1).any(-1)
        at = as_tensor(places, differs.device).unbind(1)
        changes.update(differs[at].nonzero()[:, 0].tolist())
    return sorted(changes)
