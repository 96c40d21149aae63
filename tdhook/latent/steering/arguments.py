"""What edits are made of: directions and strengths, and how they meet the value that they change."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...core.compat import visible
from ...core.errors import InputError
from ...core.structure import describe
from ..concepts.directions import as_directions


def as_direction(name: str, given: Any, most: int, nonzero: bool = True) -> Tensor:
    """The tensor [D], or up to [K, D], of a direction; raises `InputError` for others."""
    rows = as_directions(name, given, nonzero)
    if rows.ndim > most:
        raise InputError(f"{name} has shape {list(rows.shape)}; give {'[D] or [K, D]' if most == 2 else '[D]'}.")
    return rows


def as_strength(name: str, given: Any) -> float | Tensor:
    """A number, or Tensor [] or [B]; raises `InputError` for others."""
    if isinstance(given, Tensor):
        if given.ndim > 1 or given.is_complex() or given.dtype == torch.bool:
            raise InputError(f"{name} is {describe(given)}; give a number, or a tensor [] or [B].")
        if visible(given) and not given.isfinite().all():
            raise InputError(f"{name} holds NaN or infinity.")
        return given
    if not isinstance(given, (int, float)) or isinstance(given, bool) or not math.isfinite(given):
        raise InputError(f"{name} is {describe(given)}; give a finite number, or a tensor [] or [B].")
    return float(given)


def widened(name: str, value: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The value and tensors [..., D] on its device, in the dtype to compute in: that of both, float32 at least."""
    if not value.is_floating_point():
        raise InputError(f"an edit is for floating-point values, the site holds {describe(value)}.")
    dtype = torch.promote_types(value.dtype, torch.float32)
    for tensor in tensors:
        if value.ndim == 0 or tensor.shape[-1] != value.shape[-1]:
            raise InputError(f"{name} has {tensor.shape[-1]} features, the value is {describe(value)}.")
        dtype = torch.promote_types(dtype, tensor.dtype)
    return (value.to(dtype), *(tensor.to(value.device, dtype) for tensor in tensors))


def per_example(name: str, strength: float | Tensor, value: Tensor) -> float | Tensor:
    """A number, or a tensor that broadcasts to the value [*B, S, D]."""
    if not isinstance(strength, Tensor):
        return strength
    if strength.ndim and (value.ndim < 2 or strength.shape[0] != value.shape[0]):
        raise InputError(f"{name} has {len(strength)} numbers, one for each example; the value is {describe(value)}.")
    return strength.to(value.device, value.dtype).reshape([*strength.shape, *[1] * (value.ndim - 1) * strength.ndim])
