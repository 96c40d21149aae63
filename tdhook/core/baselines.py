"""Baselines: what stands in place of a feature that is removed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .explained import Explained
from .structure import describe


def replacements(what: Explained, baselines: Any, name: str = "baselines") -> list[Tensor]:
    """One tensor for each of what is explained, in its shape.

    Args:
        what: the tensors.
        baselines: a number, or the structure of the tensors (keyed by site for `at`) with numbers or tensors that broadcast.
        name: of the argument, for errors.

    Raises:
        InputError: another structure, dtype or device, or a shape that does not broadcast.
    """
    if _is_number(baselines):
        return [torch.full_like(value, baselines) for value in what.values]
    return [replacement(given, value, name) for given, value in zip(what.flatten(name, baselines), what.values)]


def replacement(given: Any, value: Tensor, name: str) -> Tensor:
    """A number or tensor in the shape of the value that it stands for."""
    if _is_number(given):
        return torch.full_like(value, given)
    if not isinstance(given, Tensor):
        raise InputError(f"{name} holds {describe(given)}; give a number or a tensor.")
    if given.dtype != value.dtype or given.device != value.device:
        raise InputError(
            f"{name} holds {describe(given)} on {given.device} for {describe(value)} on {value.device}; use .to(inputs)."
        )
    try:
        return given.expand(value.shape)
    except RuntimeError:
        raise InputError(f"{name} holds {describe(given)}, which does not broadcast to {list(value.shape)}.") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
