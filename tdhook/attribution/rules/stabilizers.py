"""Denominators kept away from zero."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.checks import require_number

_RANGE_OF_HALF = (torch.finfo(torch.float16).min, torch.finfo(torch.float16).max)


def stabilized(value: Tensor, epsilon: float) -> Tensor:
    """`value + epsilon * sign(value)`, where the sign of 0 is 1; in float32 at least."""
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    return value + torch.where(value < 0, -epsilon, epsilon).to(value)


def ratio(numerator: Tensor, denominator: Tensor, epsilon: float) -> Tensor:
    """`numerator / stabilized(denominator)` in the type of the numerator, and 0 for 0 / 0."""
    bottom = stabilized(denominator, epsilon)
    if epsilon == 0:
        bottom = torch.where(bottom == 0, torch.ones_like(bottom), bottom)
        numerator = torch.where(denominator == 0, torch.zeros_like(numerator), numerator)
    result = numerator / bottom
    if numerator.dtype == torch.float16:
        result = result.clamp(*_RANGE_OF_HALF)  # an infinite coefficient would make a value nan
    return result.to(numerator.dtype)


def require_stabilizer(name: str, value: float) -> None:
    require_number(name, value)
