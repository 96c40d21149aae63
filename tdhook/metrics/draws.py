"""Random numbers that do not depend on how they are chunked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.structure import describe


def require_generator(generator: Any) -> None:
    """Raises `InputError` for what is no generator."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(f"generator is {describe(generator)}; give a torch.Generator, torch.Generator().manual_seed(0) say.")


def require_number(name: str, value: Any, least: float = 0.0, strict: bool = False) -> None:
    """Raises `InputError` unless `value` is a finite number of at least `least` (more than that, if `strict`)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (value > least if strict else value >= least) or value == float("inf"):
        raise InputError(f"{name} is a number {'above' if strict else 'of at least'} {least:g}, got {describe(value)}.")


def normal_like(value: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers in the shape of a tensor, from the device of the generator."""
    device = value.device if generator is None else generator.device
    return torch.randn(value.shape, generator=generator, dtype=value.dtype, device=device).to(value.device)


def uniform_like(value: Tensor, generator: torch.Generator | None) -> Tensor:
    """Numbers uniform in [0, 1) in the shape of a tensor, from the device of the generator."""
    device = value.device if generator is None else generator.device
    return torch.rand(value.shape, generator=generator, dtype=value.dtype, device=device).to(value.device)


def stacked(draw: Callable[[], list[Tensor]], count: int) -> list[Tensor]:
    """Several draws of a list of tensors, each [count, *shape]: one after the other, so that chunks do not change them."""
    return [torch.stack(each) for each in zip(*(draw() for _ in range(count)))]
