"""Random numbers that do not depend on how they are chunked, nor on the device that they are for.

A generator draws on its own device, and what it drew is moved: a CPU generator gives the same numbers for any device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .structure import describe


def require_generator(generator: Any) -> None:
    """Raises `InputError` for what is neither a generator nor None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(f"generator is {describe(generator)}; give a torch.Generator, torch.Generator().manual_seed(0) say.")


def uniform(
    shape: Sequence[int], generator: torch.Generator | None, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Numbers uniform in [0, 1)."""
    return torch.rand(shape, generator=generator, dtype=dtype, device=_source(generator, device)).to(device)


def normal(
    shape: Sequence[int], generator: torch.Generator | None, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=generator, dtype=dtype, device=_source(generator, device)).to(device)


def integers(low: int, high: int, shape: Sequence[int], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Integers from `low` to `high - 1`, each as likely as the others."""
    return torch.randint(low, high, shape, generator=generator, device=_source(generator, device)).to(device)


def uniform_like(value: Tensor, generator: torch.Generator | None) -> Tensor:
    """Numbers uniform in [0, 1) in the shape and dtype of a tensor."""
    return uniform(value.shape, generator, value.device, value.dtype)


def normal_like(value: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers in the shape and dtype of a tensor."""
    return normal(value.shape, generator, value.device, value.dtype)


def stacked(draw: Callable[[], Sequence[Tensor]], count: int) -> list[Tensor]:
    """Several draws of some tensors, each [count, *shape]: one draw after the other, so that chunks do not change them.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> draw = lambda: [uniform((2,), generator, torch.device("cpu"))]
        >>> [first], [rest] = stacked(draw, 1), stacked(draw, 3)
        >>> _ = generator.manual_seed(0)
        >>> torch.equal(torch.cat([first, rest]), stacked(draw, 4)[0])
        True
    """
    return [torch.stack(each) for each in zip(*(draw() for _ in range(count)))]


def uniform_rows(count: int, length: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Numbers uniform in [0, 1), [count, length], drawn row by row."""
    return stacked(lambda: [uniform((length,), generator, device)], count)[0]


def _source(generator: torch.Generator | None, device: torch.device) -> torch.device:
    return device if generator is None else generator.device
