"""Directions of a space of activations: what is accepted as one, bases of their span, and how they lie in a site's value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.compat import visible
from ...core.errors import InputError
from ...core.structure import describe


def as_directions(name: str, given: Any, nonzero: bool = True) -> Tensor:
    """The tensor of a direction or of several: `given` itself, or its `direction` (a fitted probe, `ConceptVectors`).

    Raises:
        InputError: neither, not floating-point, without a dimension, or (where it can be seen) NaN, or zero.
    """
    directions = given if isinstance(given, Tensor) else getattr(given, "direction", None)
    if not isinstance(directions, Tensor) or not directions.is_floating_point() or directions.ndim == 0:
        raise InputError(
            f"{name} is {describe(given)}; give a floating-point tensor [D], or what has one as .direction, such as a probe."
        )
    if visible(directions):
        if not directions.isfinite().all():
            raise InputError(f"{name} holds NaN or infinity.")
        if nonzero and not directions.any():
            raise InputError(f"{name} is zero; give a direction that points somewhere.")
    return directions


def orthonormal(rows: Tensor) -> Tensor:
    """An orthonormal basis [min(K, D), D] of the span of rows [K, D], with rows of zeros where these depend on each other."""
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    scaled = rows / torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    if len(rows) == 1:
        return scaled
    _, sizes, basis = torch.linalg.svd(scaled, full_matrices=False)
    least = max(rows.shape) * torch.finfo(rows.dtype).eps * sizes[0]
    return basis * (sizes > least)[:, None]


def checked_axis(axis: int | None, value: Tensor, site: str) -> int | None:
    """`axis` counted from 0; raises `InputError` where the value at a site has no such axis."""
    if axis is None:
        return None
    if not isinstance(axis, int) or isinstance(axis, bool) or not -value.ndim <= axis < value.ndim:
        raise InputError(f"axis={axis!r} is out of range at {site!r}, which holds {describe(value)}.")
    return axis % value.ndim


def rows_of(name: str, directions: Tensor, value: Tensor, axis: int | None, site: str) -> tuple[Tensor, tuple[int, ...]]:
    """Directions as rows [K, D] of what they span at a site, and their leading dimensions [*K].

    With `axis` they have as many numbers as the value along it; without, the shape of one example of the value [B, *features].
    """
    axis = checked_axis(axis, value, site)
    features = value.shape[1:] if axis is None else value.shape[axis : axis + 1]
    lead = directions.ndim - len(features)
    if not features or lead < 0 or directions.shape[lead:] != features:
        if axis is None:
            hint = f"the features of an example are {list(features)}. With axis=i a direction lies along that axis alone."
        else:
            hint = f"along axis {axis} there are {features.numel()} features."
        raise InputError(f"{name} has shape {list(directions.shape)}, but {site!r} holds {describe(value)}: {hint}")
    return directions.reshape(-1, features.numel()), tuple(directions.shape[:lead])
