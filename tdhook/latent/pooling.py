"""From the values at a site to rows: one for each example, or one for each position of each example."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..core.compat import visible
from ..core.errors import InputError, SiteError
from ..core.structure import describe

POOLS = ("mean", "max", "last", "rows")
Pool = str | int | Callable[[Tensor, Tensor | None], Tensor] | None


def require_pool(pool: Pool) -> None:
    """Raises `InputError` for a pool that does not exist."""
    if isinstance(pool, str) and pool not in POOLS:
        raise InputError(f"pool={pool!r} is unknown; choose from {', '.join(POOLS)}, or give a number, a function or None.")
    if pool is not None and not isinstance(pool, (str, int)) and not callable(pool):
        raise InputError(f"pool is {describe(pool)}; choose from {', '.join(POOLS)}, or give a number, a function or None.")


def pooled(
    site: str, value: Tensor, mask: Tensor | None, pool: Pool, axes: Sequence[int], dtype: torch.dtype | None = None
) -> Tensor:
    """The rows of a value [B, *shape]: Tensor [B, *row], or [R, *row] for `"rows"`; a mean in `dtype`, others as they are."""
    if pool is None:
        return value
    if callable(pool):
        row = pool(value, mask)
        if not isinstance(row, Tensor) or row.ndim == 0 or len(row) != len(value):
            raise InputError(f"pool returned {describe(row)} at {site!r}; return a tensor [B, *row] with B={len(value)}.")
        return row
    value = positions_first(site, value, axes)
    mask = fitting_mask(site, value, mask)
    if pool == "rows":
        return value.flatten(0, 1) if mask is None else value[mask]
    if pool in ("last", -1) and mask is None:
        return value[:, -1]
    if pool == "max":
        return _max(value, mask)
    if pool == "mean":
        return _mean(value, mask, dtype)
    return _at(site, value, mask, -1 if pool == "last" else int(pool))


def positions_first(site: str, value: Tensor, axes: Sequence[int]) -> Tensor:
    """[B, P, *features]: the axes of positions, flattened, behind the batch."""
    if any(not -value.ndim < axis < value.ndim or axis % value.ndim == 0 for axis in axes):
        raise SiteError(
            f"site {site!r} holds {describe(value)}, where axis {', '.join(map(str, axes))} does not count positions; "
            "give axis, or pool=None for the value as it is."
        )
    return value.movedim(tuple(axes), tuple(range(1, 1 + len(axes)))).flatten(1, len(axes))


def fitting_mask(site: str, value: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask [B, P], where the value [B, P, *features] is. Raises `SiteError` for other positions."""
    if mask is None:
        return None
    flat = mask.flatten(1).to(value.device)
    if flat.shape != value.shape[:2]:
        raise SiteError(
            f"site {site!r} has {value.shape[1]} positions for each example where the mask is {describe(mask)}; give axis, or "
            "positions=..., a function of the batch that returns the mask for this site."
        )
    return flat


def over_positions(mask: Tensor, value: Tensor) -> Tensor:
    """A mask [B, P] that broadcasts to a value [B, P, *features]."""
    return mask.reshape(*mask.shape, *[1] * (value.ndim - 2))


def _max(value: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return value.amax(1)
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    return torch.where(over_positions(mask, value), wide, -torch.inf).amax(1).to(value.dtype)


def _mean(value: Tensor, mask: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    # a mean of whole numbers is none
    dtype = dtype or (value.dtype if value.is_floating_point() or value.is_complex() else wide.dtype)
    if mask is None:
        return wide.mean(1).to(dtype)
    at = over_positions(mask, value)
    # where, not a product: what stands at padded positions may be infinite
    return (torch.where(at, wide, 0).sum(1) / at.sum(1)).to(dtype)


def _at(site: str, value: Tensor, mask: Tensor | None, index: int) -> Tensor:
    """[B, *features] at the given position of each example, counted among those that the mask leaves."""
    if mask is None:
        mask = torch.ones(value.shape[:2], dtype=torch.bool, device=value.device)
    counted, lengths = mask.cumsum(1), mask.sum(1)
    wanted = index + 1 if index >= 0 else lengths[:, None] + index + 1
    here = mask & (counted == wanted)
    found = here.any(1)
    if visible(here) and not found.all():
        raise InputError(f"pool={index} is out of range at {site!r}: an example has only {int(lengths.min())} positions.")
    rows = value[torch.arange(len(value), device=value.device), here.int().argmax(1)]
    # Where a transform hides the mask, nothing can be raised: what is not there is no number.
    return rows if visible(here) else rows.masked_fill(~found.reshape(-1, *[1] * (rows.ndim - 1)), float("nan"))


def row_positions(site: str, value: Tensor, mask: Tensor | None, axes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The example and the position of each of the rows that `"rows"` makes of a value: [R] each."""
    value = positions_first(site, value, axes)
    mask = fitting_mask(site, value, mask)
    if mask is None:
        mask = torch.ones(value.shape[:2], dtype=torch.bool, device=value.device)
    examples, positions = mask.nonzero(as_tuple=True)
    return examples, positions
