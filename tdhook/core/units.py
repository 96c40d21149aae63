"""Units of a site as masks, and a value whose derivative passes through some of them only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .compat import visible
from .errors import InputError
from .structure import describe


def unit_sets(name: str, given: Any) -> Tensor:
    """K sets of units as an integer tensor [K, U] or a boolean mask [K, ...].

    Args:
        name: of the argument, for errors.
        given: a sequence of K indices or of K sequences of indices, an integer tensor [K] or [K, U], or a boolean tensor
            [K, C] or [K, *features].

    Raises:
        InputError: anything else, or an empty set.
    """
    if isinstance(given, (list, tuple, range)) and len(given):
        sets = [each if isinstance(each, (list, tuple, range)) else [each] for each in given]
        if all(len(each) and all(isinstance(u, int) and not isinstance(u, bool) for u in each) for each in sets):
            longest = max(map(len, sets))
            return torch.tensor([[*each, *[each[0]] * (longest - len(each))] for each in sets])
    integers = isinstance(given, Tensor) and not (given.is_floating_point() or given.is_complex()) and given.numel() > 0
    if integers and given.dtype == torch.bool and given.ndim > 1:
        return given
    if integers and given.dtype != torch.bool and given.ndim in (1, 2):
        return given if given.ndim == 2 else given[:, None]
    raise InputError(
        f"{name} is {describe(given)}; give K units or K sequences of units, an integer tensor [K] or [K, U], or K masks."
    )


def unit_mask(units: Tensor, value: Tensor, axis: int | None, site: str, known: Tensor | None = None) -> Tensor:
    """One set of units as a mask that broadcasts to the value at a site.

    Args:
        units: integers [U], or a boolean mask [C] along the axis or [*features] of an example.
        value: Tensor [B, *features].
        axis: the axis of the units; None: 1, where there is no other.
        site: its address, for errors.
        known: all sets, where `units` is one of them in a vmap, which hides its values.

    Raises:
        InputError: an axis that does not fit, or is missing; units out of range; a mask of another size.
    """
    mask = units.dtype == torch.bool
    if mask and axis is None and units.shape == value.shape[1:]:
        return units.to(value.device)
    if axis is None and value.ndim != 2:
        raise InputError(f"{site!r} holds {describe(value)}; give axis=1 for channels or axis=-1 for token features.")
    axis = 1 if axis is None else axis
    if not isinstance(axis, int) or isinstance(axis, bool) or not -value.ndim <= axis < value.ndim:
        raise InputError(f"axis={axis!r} is out of range at {site!r}, which holds {describe(value)}.")
    count, units = value.shape[axis], units.to(value.device)
    if mask and list(units.shape) != [count]:
        raise InputError(f"the units at {site!r} are a mask of shape {list(units.shape)} for {describe(value)} along {axis}.")
    if not mask:
        known = units if known is None else known
        if visible(known) and not ((known >= -count) & (known < count)).all():
            raise InputError(f"the units {known.flatten().tolist()} are out of range for {count} units at {site!r}.")
        units = (torch.arange(count, device=units.device)[:, None] == units % count).any(-1)
    return units.reshape(-1, *[1] * (value.ndim - 1 - axis % value.ndim))


def through(value: Tensor, mask: Tensor) -> Tensor:
    """`value`, with a derivative where the mask is true only."""
    return torch.where(mask, value, value.detach())
